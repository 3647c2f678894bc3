"""The real models load, tokenise, predict and generate as they should before anything is done to them."""

import pytest
import torch

from sparc3.evaluate import perplexity
from sparc3.samples import prompts, read_documents, windows


@pytest.fixture(scope="module")
def held_out(lee):
    documents = read_documents([lee])
    assert len(documents) == 50
    return documents


def test_calibration_text_has_windows_enough(background_text, real_model):
    found = windows(real_model.tokenizer, read_documents([background_text]), 128, count=128, seed=0)
    assert len(found) == 128


def test_english_comes_back_from_its_tokens(real_model, held_out):
    tokenizer = real_model.tokenizer
    for text in [*held_out, "12,345  apples\n\n\tcost $3.50 , at the café"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert max(ids) < real_model.model.config.vocab_size


def test_windows_and_prompts_begin_with_one_bos(real_model, held_out):
    tokenizer = real_model.tokenizer
    cut = windows(tokenizer, held_out, 32)
    batch = prompts(tokenizer, held_out[:3], side="right")
    bos = tokenizer.bos_token_id
    if bos is None:
        assert cut.shape[1] == 32
    else:
        for ids in (cut, batch["input_ids"]):
            assert (ids[:, 0] == bos).all()
            assert (ids[:, 1] != bos).all()


def test_perplexity_is_that_of_the_labels_loss(real_model, held_out):
    cut = windows(real_model.tokenizer, held_out, 128, count=2)
    with torch.no_grad():
        loss = real_model.model(cut, labels=cut, use_cache=False).loss.double()
    # The same fp32 logits, summed in another order: 1e-6 of the perplexity is 2 eps of a loss near 4.
    assert perplexity(real_model.model, cut, batch_size=2).value == pytest.approx(loss.exp().item(), rel=1e-6)


def test_smollm2_predicts_news(smollm2, held_out):
    assert smollm2.note == "dequantised from GGUF Q4_1"
    found = perplexity(smollm2.model, windows(smollm2.tokenizer, held_out, 128, count=16))
    assert (found.tokens, found.context) == (2048, 129)
    # Measured: 42.85. BLAS and thread count move fp32 logits in the sixth digit, nothing near a percent.
    assert found.value == pytest.approx(42.85, rel=0.01)


def test_gemma3_predicts_news_and_needs_its_bos(gemma3, held_out):
    assert gemma3.note == "dequantised from GGUF Q4_K_M"
    cut = windows(gemma3.tokenizer, held_out, 128, count=16)
    with_bos = perplexity(gemma3.model, cut)
    assert (with_bos.tokens, with_bos.context) == (2048, 129)
    assert with_bos.value == pytest.approx(30.95, rel=0.01)  # measured; see test_smollm2_predicts_news
    # Measured on all 16 windows: 357.4, eleven times as much; a quarter of them shows it.
    assert perplexity(gemma3.model, cut[:4, 1:]).value > 5 * with_bos.nll[:4].mean().exp()


def test_greedy_generation_continues_a_prompt(real_model):
    batch = prompts(real_model.tokenizer, ["The capital of France is", "Two plus two is"])
    made = real_model.model.generate(
        **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=batch["input_ids"][0, 0]
    )
    assert made.shape == (2, batch["input_ids"].shape[1] + 4)
    assert (made[:, :-4] == batch["input_ids"]).all()


def test_smollm2_knows_a_capital(smollm2):
    batch = prompts(smollm2.tokenizer, ["The capital of France is"])
    made = smollm2.model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert smollm2.tokenizer.decode(made[0, -1:]) == " Paris"
