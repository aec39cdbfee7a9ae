"""Whole models, built of layers."""

from s5eqx.models.backbone import Backbone as Backbone
from s5eqx.models.classifier import Classifier as Classifier
from s5eqx.models.classifier import RetrievalClassifier as RetrievalClassifier
from s5eqx.models.fno import FNO as FNO
from s5eqx.models.grid_classifier import GridClassifier as GridClassifier
from s5eqx.models.init import AbstractInit as AbstractInit
from s5eqx.models.init import DefaultInit as DefaultInit
from s5eqx.models.init import GPT2Init as GPT2Init
from s5eqx.models.init import S5Init as S5Init
from s5eqx.models.language_model import LanguageModel as LanguageModel
from s5eqx.models.pool import AbstractPool as AbstractPool
from s5eqx.models.pool import LastPool as LastPool
from s5eqx.models.pool import MeanPool as MeanPool
from s5eqx.models.regressor import Regressor as Regressor
from s5eqx.models.sequence_encoder import SequenceEncoder as SequenceEncoder
from s5eqx.models.sequence_parallel import SequenceParallel as SequenceParallel
