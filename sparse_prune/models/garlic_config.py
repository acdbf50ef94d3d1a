"""The sizes of a Garlic model, apart from the model itself so that AutoConfig knows them without loading it."""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))


class GarlicConfig(PreTrainedConfig):
    """Sizes of a Garlic model; hidden sizes are multiples of 32 so that 32x32 blocks tile every encoder weight.

    ngram_buckets and ngram_size are the rows and columns of each of the two n-gram tables (0 buckets: no tables); max_distance is
    where relative distances are clipped.
    """

    model_type = "garlic"

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 128
    max_distance: int = 32
    ngram_buckets: int = 32768
    ngram_size: int = 64
    hidden_dropout_prob: float = 0.1
    embedding_dropout_prob: float = 0.3
    token_dropout_prob: float = 0.1
    classifier_dropout: float = 0.2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    label_smoothing: float = 0.0
    pad_token_id: int = PAD
    cls_token_id: int = CLS
    mask_token_id: int = MASK


AutoConfig.register(GarlicConfig.model_type, GarlicConfig)
