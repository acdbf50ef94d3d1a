"""Garlic: a small pre-norm self-attention encoder for Chinese characters, as a Hugging Face model.

One layer, for hidden states x[B, T, H]:

    q, k, v = split(qkv(norm(x)))                                   qkv    is one Linear [3H, H]
    x = x + out(softmax(q k^T / sqrt(d) + bias + padding) v)        out    is a Linear [H, H]
    x = x + ffn_out(gelu(ffn_in(norm(x))))                          ffn_in [F, H], ffn_out [H, F]

`bias` is a learned number per head and clipped distance (Shaw et al. 2018, in the scalar form of Raffel et al. 2020), shared by all
layers. Beside its character, each position embeds the two character bigrams and the trigram around it, by hashing ids into tables
(Bojanowski et al. 2017): a model trained from scratch on some ten thousand texts gets its words from there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from ..layers import fused_linear
from .garlic_config import CLS, SEP, SPECIAL_TOKENS, GarlicConfig

HASH_MULTIPLIER = 0x01000193  # FNV's prime: odd, so that every id moves the low bits


class GarlicEmbeddings(nn.Module):
    """Characters, hashed bigrams and trigrams: input_ids [B, T] -> [B, T, H]."""

    def __init__(self, config: GarlicConfig):
        super().__init__()
        self.config = config
        self.characters: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        if config.ngram_buckets:
            self.bigrams = nn.Embedding(config.ngram_buckets, config.ngram_size)
            self.trigrams = nn.Embedding(config.ngram_buckets, config.ngram_size)
            self.ngrams = nn.Linear(3 * config.ngram_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout_prob)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """attention_mask [B, T] is 1 at tokens; what stands at padding changes nothing."""
        ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)  # [B, T]
        if self.training and self.config.token_dropout_prob:
            dropped = torch.rand(ids.shape, device=ids.device) < self.config.token_dropout_prob
            ids = ids.masked_fill(dropped & (ids >= len(SPECIAL_TOKENS)), self.config.mask_token_id)
        hidden = self.characters(ids)  # [B, T, H]
        if self.config.ngram_buckets:
            edges = F.pad(ids, (1, 1), value=self.config.pad_token_id)  # [B, T + 2]
            pairs = self.bigrams(self._bucket(edges[:, :-1], edges[:, 1:]))  # [B, T + 1, ngram_size]
            triples = self.trigrams(self._bucket(edges[:, :-2], edges[:, 1:-1], edges[:, 2:]))  # [B, T, ngram_size]
            hidden = hidden + self.ngrams(torch.cat((pairs[:, :-1], pairs[:, 1:], triples), -1))
        return self.dropout(self.norm(hidden))

    def _bucket(self, *ids: Tensor) -> Tensor:
        """One bucket per position for the ids side by side: a multiplicative hash in int64, which wraps alike on every device."""
        code = ids[0]
        for other in ids[1:]:
            code = code * HASH_MULTIPLIER ^ other
        code = code ^ (code >> 15)
        return (code * 0x9E3779B1 >> 7) % self.config.ngram_buckets


class GarlicAttention(nn.Module):
    """Self-attention of config.num_attention_heads heads over x[B, T, H] with an additive bias [B, heads, T, T]."""

    def __init__(self, config: GarlicConfig):
        super().__init__()
        self.config = config
        self.heads, self.head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """The heads side by side, before `out`: [B, T, H], and the weights [B, heads, T, T] where they are wanted."""
        batch, length, _ = x.shape
        qkv = fused_linear(self.qkv, x).view(batch, length, 3, self.heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, d]
        # Training on a CPU takes the explicit product: with a bias that learns PyTorch's does the same in more passes, and
        # its fused backward is four times slower in bf16.
        explicit = (
            need_weights or self.config._attn_implementation == "eager" or (self.training and q.device.type == "cpu")
        )
        weights = None
        if explicit:
            scores = (q * self.head_size**-0.5) @ k.transpose(-1, -2) + bias.to(q.dtype)  # [B, heads, T, T]
            weights = torch.softmax(scores, -1)  # [B, heads, T, T]
            context = weights @ v  # [B, heads, T, d]
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return context.transpose(1, 2).reshape(batch, length, -1), weights if need_weights else None


class SequenceDropout(nn.Dropout):
    """Dropout of x[B, T, H] that drops a feature at all T positions of a row alike (Gal and Ghahramani 2016).

    On a CPU drawing a number per element takes a tenth of a training step; this draws T times fewer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x[B, T, H] -> the same shape; in evaluation x itself."""
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p, self.training) if self.training else x


class GarlicLayer(nn.Module):
    """One pre-norm block: attention, then the feed-forward network, each added to its input."""

    def __init__(self, config: GarlicConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GarlicAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = SequenceDropout(config.hidden_dropout_prob)
        self.attention.out.ends_branch = self.ffn_out.ends_branch = True  # type: ignore[assignment]  # no tensor

    def forward(self, x: Tensor, bias: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x[B, T, H] -> the same shape, and the attention weights where they are wanted."""
        context, weights = self.attention(self.attention_norm(x), bias, need_weights)
        x = self._add(self.attention.out, context, x)
        inner = fused_linear(self.ffn_in, self.ffn_norm(x), activation="gelu")  # [B, T, F]
        return self._add(self.ffn_out, inner, x), weights

    def _add(self, linear: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        if self.training and self.dropout.p:
            return x + self.dropout(fused_linear(linear, y))
        return fused_linear(linear, y, residual=x)


def local_bias(config: GarlicConfig) -> Tensor:
    """Where the bias by distance starts, [2 * max_distance + 1, heads], so that training need not find neighbours first.

    In each four heads one prefers the token before, one the token after, one what is near (ALiBi, Press et al. 2022), and one has
    no preference.
    """
    distance = torch.arange(-config.max_distance, config.max_distance + 1)
    before, after = 3.0 * (distance == -1), 3.0 * (distance == 1)
    near, any_ = -0.25 * distance.abs(), torch.zeros(len(distance))
    kinds = torch.stack((before, after, near, any_), -1)  # [2 max_distance + 1, 4]
    return kinds.repeat(1, -(-config.num_attention_heads // 4))[:, : config.num_attention_heads]


class GarlicEncoder(nn.Module):
    """The layers, the relative-position bias they share, and the closing norm."""

    def __init__(self, config: GarlicConfig):
        super().__init__()
        self.config = config
        self.distances = nn.Embedding(2 * config.max_distance + 1, config.num_attention_heads)
        self.distances.of_distances = True  # type: ignore[assignment]  # no tensor
        self.layers = nn.ModuleList(GarlicLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, x: Tensor, attention_mask: Tensor, output_attentions: bool, output_hidden_states: bool
    ) -> BaseModelOutput:
        """x[B, T, H], attention_mask [B, T]; hidden_states are the embeddings and each layer's output, the last one normed."""
        bias = self.bias(attention_mask)
        states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, bias, output_attentions)
            states.append(x)
            attentions.append(weights)
        x = states[-1] = self.norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def bias(self, attention_mask: Tensor) -> Tensor:
        """Bias by distance, and the lowest number at padded keys: [B, heads, T, T]."""
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        limit = self.config.max_distance
        distance = (place[None, :] - place[:, None]).clamp(-limit, limit) + limit  # [T, T]
        bias = self.distances(distance).permute(2, 0, 1)[None]  # [1, heads, T, T]
        padded = (attention_mask == 0)[:, None, None, :]  # [B, 1, 1, T]
        return bias.masked_fill(padded, torch.finfo(bias.dtype).min)


class GarlicPreTrainedModel(PreTrainedModel):
    """Initialisation and naming that the heads share."""

    config: GarlicConfig
    config_class = GarlicConfig
    base_model_prefix = "garlic"
    accepts_loss_kwargs = False  # the losses are means over the batch, whatever the Trainer counts
    _supports_sdpa = True
    _no_split_modules = ["GarlicLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # Each residual branch starts small, as in GPT-2, so that depth does not grow the sum.
            shrink = math.sqrt(2 * self.config.num_hidden_layers) if getattr(module, "ends_branch", False) else 1.0
            nn.init.normal_(module.weight, std=deviation / shrink)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            if getattr(module, "of_distances", False):
                init.copy_(module.weight, local_bias(self.config))
                return
            nn.init.normal_(module.weight, std=deviation)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])


class GarlicModel(GarlicPreTrainedModel):
    """Embeddings and encoder, without a head."""

    def __init__(self, config: GarlicConfig):
        super().__init__(config)
        self.embeddings = GarlicEmbeddings(config)
        self.encoder = GarlicEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.characters

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.characters = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> BaseModelOutput:
        """input_ids int [B, T], attention_mask [B, T] with 1 at tokens (default: everywhere but at padding ids)."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return self.encoder(
            self.embeddings(input_ids, attention_mask), attention_mask, output_attentions, output_hidden_states
        )


class GarlicForSequenceClassification(GarlicPreTrainedModel):
    """A class per text, from the mean and the maximum over its tokens."""

    def __init__(self, config: GarlicConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.garlic = GarlicModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(2 * config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: object
    ) -> SequenceClassifierOutput:
        """labels int [B]; the loss is the cross entropy over logits [B, num_labels]."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        output = self.garlic(input_ids, attention_mask, **options)
        hidden = output.last_hidden_state  # [B, T, H]
        mask = attention_mask[..., None].to(hidden.dtype)  # [B, T, 1]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B, H]
        highest = hidden.masked_fill(mask == 0, torch.finfo(hidden.dtype).min).amax(1)  # [B, H]
        logits = self.classifier(self.dropout(torch.cat((mean, highest), -1)))  # [B, num_labels]
        loss = (
            None
            if labels is None
            else F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        )
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class GarlicForTokenClassification(GarlicPreTrainedModel):
    """A class per token."""

    def __init__(self, config: GarlicConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.garlic = GarlicModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: object
    ) -> TokenClassifierOutput:
        """labels int [B, T], -100 where nothing is predicted; the loss is the cross entropy over logits [B, T, num_labels]."""
        output = self.garlic(input_ids, attention_mask, **options)
        logits = self.classifier(self.dropout(output.last_hidden_state))  # [B, T, num_labels]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), label_smoothing=self.config.label_smoothing
            )
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


def train_tokenizer(
    texts: Iterable[str], max_vocabulary: int = 4096, min_count: int = 2, max_length: int = 128
) -> PreTrainedTokenizerFast:
    """A character tokenizer over the `max_vocabulary` most frequent characters of texts; ties go by code point.

    Unicode NFKC and lower case first, so that full-width and half-width letters and digits share their ids; white space only parts.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(character for character in normalizer.normalize_str(text) if not character.isspace())
    kept = sorted((c for c, n in counts.items() if n >= min_count), key=lambda c: (-counts[c], c))
    entries = [*SPECIAL_TOKENS, *kept[: max_vocabulary - len(SPECIAL_TOKENS)]]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def register() -> None:
    """Tell the Auto classes about Garlic's models; done once, when this module is imported."""
    AutoModel.register(GarlicConfig, GarlicModel)
    AutoModelForSequenceClassification.register(GarlicConfig, GarlicForSequenceClassification)
    AutoModelForTokenClassification.register(GarlicConfig, GarlicForTokenClassification)


register()
