"""From raw files to batches: tokenizers, prepared datasets, packing, and the loader."""

from lwm.data.dataset import TRAIN, VALIDATION, Dataset
from lwm.data.documents import BadDocument, Document, DocumentBuilder, text_document, video_document
from lwm.data.loader import Loader, open_datasets
from lwm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from lwm.data.vision_tokens import frame_codes, frame_tokens
from lwm.data.writer import DatasetWriter
