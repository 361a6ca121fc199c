"""The example model trains, agrees with its swapped copy and writes text; the report is drawn."""

from __future__ import annotations

import copy
import io

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

import attn_ext
from examples import demo
from examples.language_model import LanguageModel, ModelConfig
from examples.report import Result, results_table, save_plot
from examples.text import Tokenizer, consecutive_batches, load_corpus, load_text, random_batches
from examples.training import Trainer, evaluate

BATCH, CONTEXT, STEPS = 3, 24, 12
pytestmark = pytest.mark.filterwarnings("ignore::attn_ext.ReferenceFallbackWarning")


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(params=[False, True], ids=["attention", "encoder_layers"])
def models(request, corpus):
    """A stock model and its swapped copy."""
    torch.manual_seed(0)
    config = ModelConfig(
        len(corpus.tokenizer.tokens),
        CONTEXT,
        width=16,
        heads=2,
        layers=2,
        encoder_layers=request.param,
    )
    stock = LanguageModel(config)
    ours = copy.deepcopy(stock)
    assert len(attn_ext.replace_multihead_attention(ours)) == config.layers
    return stock, ours


def test_text_comes_back_from_its_tokens():
    text = load_text()
    tokenizer = Tokenizer(text)
    assert len(text) > 100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="lacks"):
        tokenizer.encode("\u3042")


def test_no_paragraph_comes_twice():
    paragraphs = load_text().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


def test_batches_are_shifted_by_one():
    tokens = torch.arange(100)
    for inputs, targets in random_batches(tokens, BATCH, CONTEXT, 5, seed=0):
        assert inputs.shape == targets.shape == (BATCH, CONTEXT)
        assert torch.equal(inputs + 1, targets)
    inputs, targets = map(torch.cat, zip(*consecutive_batches(tokens, BATCH, CONTEXT), strict=True))
    assert torch.equal(inputs.flatten(), torch.arange(96))
    assert torch.equal(inputs + 1, targets)
    with pytest.raises(ValueError, match="context"):
        next(random_batches(tokens, BATCH, 100, 1, seed=0))
    with pytest.raises(ValueError, match="context"):
        next(consecutive_batches(tokens, BATCH, 100))


def test_the_model_sees_no_later_token(models):
    tokens = torch.randint(100, (2, CONTEXT))
    changed = tokens.clone()
    changed[:, 10:] += 1
    for model in models:
        before, after = (model.eval()(each) for each in (tokens, changed))
        torch.testing.assert_close(before[:, :10], after[:, :10])
        assert not torch.allclose(before[:, 10:], after[:, 10:])
    with pytest.raises(ValueError, match="at most"):
        models[0](torch.zeros(1, CONTEXT + 1, dtype=torch.int64))


def test_both_sides_learn_the_same(models, corpus):
    stock, ours = (Trainer(model, STEPS, learning_rate=1e-2) for model in models)
    for batch in random_batches(corpus.train, BATCH, CONTEXT, STEPS, seed=0):
        for side in (stock, ours):
            side.step(*batch)
    assert ours.losses[-1] < ours.losses[0] - 0.3
    assert demo.disagreements(ours.losses, stock.losses) == []
    held_out = list(consecutive_batches(corpus.validation[:500], BATCH, CONTEXT))
    losses = [evaluate(side.model, held_out) for side in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(side.model.training for side in (ours, stock))


def test_logits_are_as_exact_as_stock(models):
    ours, stock = demo.logit_errors(models[1], models[1].config, torch.randint(100, (2, CONTEXT)))
    assert 0 < ours <= 2 * stock < 1e-4


def test_generated_text_continues_the_prompt(models, corpus):
    prompt = "The following"
    text = demo.sample(models[1], corpus, prompt, seed=0)
    assert text.startswith(prompt)
    assert len(prompt) + 100 < len(text) <= len(prompt) + 300
    assert set(text) <= set(load_text())
    assert text == demo.sample(models[1], corpus, prompt, seed=0)


def test_a_disagreement_is_reported():
    assert demo.disagreements([3.0, 2.0], [3.0, 2.0]) == []
    assert "step 2" in demo.disagreements([3.0, 2.0], [3.0, 2.01])[0]
    assert "step 1" in demo.disagreements([float("nan"), 2.0], [3.0, 2.0])[0]


def test_table_and_plot(tmp_path):
    ours = Result([3.0, 2.0], 0.1, 1000.0, 2**20, 2.5)
    stock = Result([3.0, 2.0], 0.2, 500.0, 2**21, 2.5)
    console = Console(width=100, file=io.StringIO())
    console.print(results_table(ours, stock))
    text = console.file.getvalue()
    for figure in ("100.0 ms", "200.0 ms", "1,000", "1 MiB", "2 MiB", "2.5000", "0.50", "2.00"):
        assert figure in text
    path = tmp_path / "new" / "curves.png"
    save_plot(ours.losses, stock.losses, demo.tolerances(stock.losses), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_options_are_refused(capsys):
    for options in (["--steps", "0"], ["--width", "30"], ["--heads", "x"]):
        with pytest.raises(SystemExit):
            demo.parse_arguments(options)
        assert options[0] in capsys.readouterr().err
