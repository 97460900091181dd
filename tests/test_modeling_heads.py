"""Heads on FoX: found by the Auto classes, indifferent to padding, and able to learn what the text tells them."""

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, pipeline

from fox_training.tokenizers import byte_tokenizer
from helpers import random_tokens, tiny_fox
from modeling_fox import FoxForQuestionAnswering, FoxForSequenceClassification, FoxForTokenClassification

PAD = 0


def learn(model, steps, batch_of, learning_rate=0.01):
    """Losses of `steps` steps of Adam on fresh batches."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        loss = model(**batch_of(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def head(model_class, **config):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 2, "initializer_range": 0.1}
    return tiny_fox(model_class=model_class, pad_token_id=PAD, **(sizes | config))


@pytest.mark.parametrize(
    "model_class, auto_class",
    [
        (FoxForTokenClassification, AutoModelForTokenClassification),
        (FoxForQuestionAnswering, AutoModelForQuestionAnswering),
    ],
)
def test_auto_classes_load_what_was_saved(tmp_path, model_class, auto_class):
    model, tokens = head(model_class), random_tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    for got, expected in zip(loaded(tokens).to_tuple(), model(tokens).to_tuple(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("model_class", [FoxForTokenClassification, FoxForQuestionAnswering])
def test_padding_on_the_left_changes_no_real_token(model_class):
    model, tokens = head(model_class), random_tokens(1, 9)
    padded = torch.cat([torch.full((1, 4), PAD), tokens], dim=1)
    alone, shifted = model(tokens), model(padded, attention_mask=(padded != PAD).long())
    for got, expected in zip(shifted.to_tuple(), alone.to_tuple(), strict=True):
        torch.testing.assert_close(got[:, 4:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [(0, 4), (4, 0)], ids=["right", "left"])
def test_embeddings_are_classified_at_the_last_real_token(padding):
    """They hold no padding token: the mask tells."""
    model, tokens = head(FoxForSequenceClassification, num_labels=3), random_tokens(2, 9)
    padded = torch.nn.functional.pad(tokens[:1], padding, value=PAD)
    batch = torch.cat([padded, random_tokens(1, 13, seed=1)])
    inputs = {"inputs_embeds": model.get_input_embeddings()(batch), "attention_mask": (batch != PAD).long()}
    torch.testing.assert_close(model(**inputs).logits[:1], model(tokens[:1]).logits, rtol=0, atol=1e-5)


def test_token_classes_that_depend_on_the_token_before_are_learned():
    """Is this token larger than the last? The first has no class."""
    model = head(FoxForTokenClassification, num_labels=2)

    def batch_of(step):
        tokens = random_tokens(16, 12, seed=step)
        labels = torch.cat([torch.full((16, 1), -100), (tokens[:, 1:] > tokens[:, :-1]).long()], dim=1)
        return {"input_ids": tokens, "labels": labels}

    losses = learn(model, 120, batch_of)
    test = batch_of(1000)
    right = (model(test["input_ids"]).logits.argmax(-1) == test["labels"])[:, 1:].float().mean()
    assert losses[0] > 0.6 and right > 0.85


def test_labels_of_minus_100_are_left_out_of_the_loss():
    model, tokens = head(FoxForTokenClassification, num_labels=3), random_tokens(2, 6)
    labels = random_tokens(2, 6, vocab_size=3)
    labels[:, 2:] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :2].flatten(0, 1), labels[:, :2].flatten())
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def test_the_span_between_two_marks_is_found():
    """The answer begins at token 2 and ends at token 3, each of which occurs once."""
    model = head(FoxForQuestionAnswering)

    def batch_of(step):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(4, 97, (16, 10), generator=generator)
        start = torch.randint(0, 5, (16,), generator=generator)
        end = start + torch.randint(1, 5, (16,), generator=generator)
        rows = torch.arange(16)
        tokens[rows, start], tokens[rows, end] = 2, 3
        return {"input_ids": tokens, "start_positions": start, "end_positions": end}

    losses = learn(model, 40, batch_of)
    test = batch_of(1000)
    out = model(test["input_ids"])
    assert losses[0] > 1.5 and losses[-1] < 0.1
    assert torch.equal(out.start_logits.argmax(-1), test["start_positions"])
    assert torch.equal(out.end_logits.argmax(-1), test["end_positions"])
    assert model(test["input_ids"], start_positions=test["start_positions"]).loss is None


def test_dropout_acts_on_the_tokens_of_a_classifier_in_training_only():
    model, tokens = head(FoxForTokenClassification, hidden_dropout=0.5), random_tokens(1, 8)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    seen = []
    model.dropout.register_forward_hook(lambda module, args, out: seen.append((out == 0).float().mean()))
    model.train()(tokens)
    assert 0.3 < seen[0] < 0.7


@pytest.mark.parametrize(
    "model_class, task",
    [(FoxForTokenClassification, "token-classification"), (FoxForSequenceClassification, "text-classification")],
)
def test_pipelines_take_the_heads(model_class, task):
    tokenizer = byte_tokenizer()
    model = tiny_fox(model_class=model_class, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    answers = pipeline(task, model=model, tokenizer=tokenizer)(["foxes", "a den"], batch_size=2)
    answers = [answer if isinstance(answer, list) else [answer] for answer in answers]
    assert [len(answer) for answer in answers] == ([5, 5] if task == "token-classification" else [1, 1])
    assert all(0 <= row["score"] <= 1 for answer in answers for row in answer)
