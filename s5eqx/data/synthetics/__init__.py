"""Tasks whose examples are generated, each a pure function of a seed and a number, on the device, of any length."""

from s5eqx.data.synthetics._synthetic import AbstractLabelTask as AbstractLabelTask
from s5eqx.data.synthetics._synthetic import AbstractSeriesTask as AbstractSeriesTask
from s5eqx.data.synthetics._synthetic import AbstractSynthetic as AbstractSynthetic
from s5eqx.data.synthetics._synthetic import AbstractTokenTask as AbstractTokenTask
from s5eqx.data.synthetics.addition import Addition as Addition
from s5eqx.data.synthetics.assoc_recall import AssocRecall as AssocRecall
from s5eqx.data.synthetics.counting import Counting as Counting
from s5eqx.data.synthetics.induction_heads import InductionHeads as InductionHeads
from s5eqx.data.synthetics.linear_functions import LinearFunctions as LinearFunctions
from s5eqx.data.synthetics.list_ops import ListOps as ListOps
from s5eqx.data.synthetics.majority import Majority as Majority
from s5eqx.data.synthetics.pendulum import Pendulum as Pendulum
from s5eqx.data.synthetics.selective_copying import SelectiveCopying as SelectiveCopying
from s5eqx.data.synthetics.shapes import Shapes as Shapes
