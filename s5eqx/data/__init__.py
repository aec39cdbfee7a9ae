"""Tasks and corpora: every example is a pure function of a seed and a number."""

from s5eqx.data._task import AbstractTask as AbstractTask
from s5eqx.data._task import Batch as Batch
from s5eqx.data.assoc_recall import AssocRecall as AssocRecall
