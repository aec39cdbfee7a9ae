"""Tasks and corpora: every example is a pure function of a seed and a number."""

from s5eqx.data._task import AbstractBatch as AbstractBatch
from s5eqx.data._task import AbstractCorpus as AbstractCorpus
from s5eqx.data._task import AbstractTask as AbstractTask
from s5eqx.data._task import Batch as Batch
from s5eqx.data._task import LabelledBatch as LabelledBatch
from s5eqx.data._task import SeriesBatch as SeriesBatch
from s5eqx.data.bpe import train_bpe as train_bpe
from s5eqx.data.corpus import read_corpus as read_corpus
from s5eqx.data.documents import Documents as Documents
from s5eqx.data.documents import Splits as Splits
from s5eqx.data.documents import cut as cut
from s5eqx.data.documents import unique_paragraphs as unique_paragraphs
from s5eqx.data.load import TextData as TextData
from s5eqx.data.load import load_text as load_text
from s5eqx.data.synthetics import AssocRecall as AssocRecall
from s5eqx.data.text import Text as Text
from s5eqx.data.tokenizer import AbstractTokenizer as AbstractTokenizer
from s5eqx.data.tokenizer import Bytes as Bytes
from s5eqx.data.tokenizer import Subwords as Subwords
from s5eqx.data.tokenizer import read_tokenizer as read_tokenizer
from s5eqx.data.tokens import Tokens as Tokens
from s5eqx.data.tokens import tokenize as tokenize
