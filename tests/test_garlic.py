"""Garlic as a Hugging Face model: what it computes, and that it saves, loads and trains as others do."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from sparse_prune.models.garlic import (
    GarlicForSequenceClassification,
    GarlicForTokenClassification,
    GarlicModel,
    SequenceDropout,
    train_tokenizer,
)
from sparse_prune.models.garlic_config import CLS, MASK, PAD, SEP, UNK, GarlicConfig

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_distance": 4,
    "ngram_buckets": 64,
    "ngram_size": 8,
}
HEADS = (GarlicForSequenceClassification, GarlicForTokenClassification)


def tiny(kind=GarlicModel, **settings):
    torch.manual_seed(0)
    model = kind(GarlicConfig(**TINY | settings)).eval()
    with torch.no_grad():  # at its initial zeros the bias would hide mistakes
        model.base_model.encoder.distances.weight.normal_()
    return model


def batch(rows=3, length=11):
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, 50, (rows, length), generator=generator)}


def test_shapes_states_and_attentions():
    output = tiny()(**batch(), output_attentions=True, output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, 11, 32)
    assert [state.shape for state in output.hidden_states] == [(3, 11, 32)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [a.shape for a in output.attentions] == [(3, 2, 11, 11)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 11))


def test_both_attention_paths_agree():
    model, inputs = tiny(), batch()
    inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
    inputs["attention_mask"][1, 6:] = 0
    fused = model(**inputs).last_hidden_state
    explicit = model(**inputs, output_attentions=True).last_hidden_state
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(fused[kept], explicit[kept], atol=1e-5, rtol=1e-5)


def test_attention_is_what_the_formula_says():
    model = tiny(num_hidden_layers=1)
    layer, inputs = model.encoder.layers[0], batch(rows=1, length=5)
    x = model.embeddings(inputs["input_ids"], torch.ones(1, 5, dtype=torch.long))
    q, k, v = layer.attention.qkv(layer.attention_norm(x)).split(32, -1)
    context = []
    for head in range(2):
        span = slice(16 * head, 16 * (head + 1))
        scores = q[0, :, span] @ k[0, :, span].T / 4
        for i in range(5):
            for j in range(5):
                scores[i, j] += model.encoder.distances.weight[max(-4, min(4, j - i)) + 4, head]
        context.append(scores.softmax(-1) @ v[0, :, span])
    y = x + layer.attention.out(torch.cat(context, -1))
    y = y + layer.ffn_out(torch.nn.functional.gelu(layer.ffn_in(layer.ffn_norm(y))))
    torch.testing.assert_close(model(**inputs).last_hidden_state, model.encoder.norm(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_padding_changes_nothing(kind):
    model, ids = tiny(kind), batch(rows=1, length=7)["input_ids"]
    alone = model(input_ids=ids).logits
    padded = torch.cat((ids, torch.tensor([[9, 9, 9]])), 1)  # even with real characters under the mask
    mask = torch.cat((torch.ones(1, 7), torch.zeros(1, 3)), 1).long()
    beside = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(beside if beside.dim() == 2 else beside[:, :7], alone, atol=1e-5, rtol=1e-5)


def test_order_of_characters_matters():
    model, ids = tiny(), batch(rows=1)["input_ids"]
    assert not torch.allclose(model(ids).last_hidden_state.mean(1), model(ids.flip(1)).last_hidden_state.mean(1))


@pytest.mark.parametrize("kind", HEADS)
def test_every_parameter_gets_a_gradient(kind):
    model, inputs = tiny(kind).train(), batch()
    labels = torch.tensor([0, 1, 0]) if kind is HEADS[0] else torch.randint(0, 2, (3, 11))
    model(**inputs, labels=labels).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_token_dropout_hides_characters_in_training_only():
    model = tiny(token_dropout_prob=1.0, embedding_dropout_prob=0.0).train()
    ids = batch(rows=1, length=4)["input_ids"]
    hidden = model.embeddings(ids, torch.ones_like(ids))
    torch.testing.assert_close(hidden, tiny().embeddings(torch.full_like(ids, MASK), torch.ones_like(ids)))
    assert not torch.equal(model.eval().embeddings(ids, torch.ones_like(ids)), hidden)


def test_branches_start_small():
    model = tiny(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    layer = model.encoder.layers[0]
    assert float(layer.ffn_in.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.ffn_out.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("auto", "kind"), [(AutoModelForSequenceClassification, HEADS[0]), (AutoModelForTokenClassification, HEADS[1])]
)
def test_saved_and_loaded_through_the_auto_classes(tmp_path, auto, kind):
    model = tiny(kind, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind and loaded.config.id2label[2] == "c"
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GarlicConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GarlicModel)


def test_the_trainer_lowers_its_loss(tmp_path):
    model = tiny(GarlicForSequenceClassification)
    rows = [{"input_ids": torch.full((6,), 10 + i % 2), "labels": i % 2} for i in range(32)]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_the_tokenizer_counts_characters_and_joins_widths(tmp_path):
    tokenizer = train_tokenizer(["ＡＢ中国中国", "ab 中1１"], min_count=2)
    ids = tokenizer("Ａb 中1龙")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "b", "中", "1", "[UNK]", "[SEP]"]
    assert (ids[0], ids[-2], ids[-1]) == (CLS, UNK, SEP) and tokenizer.pad_token_id == PAD
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Ａb 中1龙")["input_ids"] == ids and again.mask_token_id == MASK


def test_the_vocabulary_is_capped_by_frequency():
    tokenizer = train_tokenizer(["中中中国国人"], max_vocabulary=7, min_count=1)
    assert set(tokenizer.get_vocab()) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "中", "国"}


def test_sequence_dropout_drops_features_of_a_whole_row():
    torch.manual_seed(0)
    dropout, x = SequenceDropout(0.5), torch.ones(64, 5, 32)
    dropped = dropout.train()(x)
    assert torch.equal(dropped, dropped[:, :1].expand_as(x)) and set(dropped.unique().tolist()) == {0.0, 2.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.1)
    assert dropout.eval()(x) is x


def test_heads_start_with_a_sense_of_place():
    torch.manual_seed(0)
    start = GarlicModel(GarlicConfig(**TINY | {"num_attention_heads": 4})).encoder.distances.weight.detach()
    assert start[:, 0].argmax() == 3 and start[:, 1].argmax() == 5 and start[:, 2].argmax() == 4
    assert not start[:, 3].any()
