"""From raw files to batches: tokenizers, prepared datasets, packing, and the loader."""

from lwm.data.dataset import Dataset
from lwm.data.dataset import TRAIN
from lwm.data.dataset import VALIDATION
from lwm.data.documents import BadDocument
from lwm.data.documents import Document
from lwm.data.documents import DocumentBuilder
from lwm.data.documents import text_document
from lwm.data.documents import video_document
from lwm.data.loader import Loader
from lwm.data.tokenizer import load_tokenizer
from lwm.data.tokenizer import Tokenizer
from lwm.data.tokenizer import train_sentencepiece
from lwm.data.vision_tokens import frame_codes
from lwm.data.vision_tokens import frame_tokens
from lwm.data.writer import DatasetWriter
