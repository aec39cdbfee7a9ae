from s5eqx.models.backbone import Backbone as Backbone
from s5eqx.models.init import AbstractInit as AbstractInit, DefaultInit as DefaultInit, S5Init as S5Init
from s5eqx.models.language_model import LanguageModel as LanguageModel
