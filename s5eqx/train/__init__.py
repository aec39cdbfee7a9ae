"""Training: parameter groups, the compiled step, the loop, checkpoints and logs."""

from s5eqx.train.checkpoint import Checkpoints as Checkpoints
from s5eqx.train.log import Logger as Logger
from s5eqx.train.loop import Result as Result
from s5eqx.train.loop import Target as Target
from s5eqx.train.loop import fit as fit
from s5eqx.train.loss import Score as Score
from s5eqx.train.loss import next_token as next_token
from s5eqx.train.loss import score as score
from s5eqx.train.monitor import spectral_radius as spectral_radius
from s5eqx.train.optim import AbstractGroups as AbstractGroups
from s5eqx.train.optim import DefaultGroups as DefaultGroups
from s5eqx.train.optim import Group as Group
from s5eqx.train.optim import PublishedGroups as PublishedGroups
from s5eqx.train.run import Run as Run
from s5eqx.train.run import commit as commit
from s5eqx.train.run import open_run as open_run
from s5eqx.train.run import versions as versions
from s5eqx.train.schedule import AbstractSchedule as AbstractSchedule
from s5eqx.train.schedule import PublishedCosine as PublishedCosine
from s5eqx.train.schedule import WarmupConstant as WarmupConstant
from s5eqx.train.schedule import WarmupCosine as WarmupCosine
from s5eqx.train.signals import interruption as interruption
from s5eqx.train.step import Trainer as Trainer
from s5eqx.train.step import TrainState as TrainState
