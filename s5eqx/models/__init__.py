"""Whole models, built of layers."""

from s5eqx.models.backbone import Backbone as Backbone
from s5eqx.models.init import AbstractInit as AbstractInit
from s5eqx.models.init import DefaultInit as DefaultInit
from s5eqx.models.init import S5Init as S5Init
from s5eqx.models.language_model import LanguageModel as LanguageModel
