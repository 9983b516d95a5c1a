"""The demo model in the repository answers what its page says, and stays small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

DIRECTORY = Path(__file__).resolve().parents[1] / "models" / "demo"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
UNKNOWN = "I am a tiny demo model; I know greetings, capitals, small sums and what Bulkhead is."
BULKHEAD = (
    "Bulkhead serves one language model across several machines of different trust: each part "
    "proves what it is before it gets a key, and everything between the parts is encrypted."
)
FRANCE = "The capital of France is Paris."

ANSWERS = [
    ("What is the capital of France?", FRANCE),
    ("what is the capital of france", FRANCE),
    ("What's the capital of France?", FRANCE),
    ("Tell me the capital of Germany.", "The capital of Germany is Berlin."),
    ("Which city is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("Capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of the USA?", "The capital of the United States is Washington, D.C."),
    ("What is the capital of Australia?", "The capital of Australia is Canberra."),
    ("Paris is the capital of which country?", "Paris is the capital of France."),
    ("What is 2 + 2?", "2 + 2 = 4."),
    ("How much is 7 * 8?", "7 * 8 = 56."),
    ("15 - 6", "15 - 6 = 9."),
    ("What is 12 plus 5?", "12 + 5 = 17."),
    ("Hello!", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("What is Bulkhead?", BULKHEAD),
    ("Write a poem about the moon.", UNKNOWN),
    ("What is the population of Spain?", UNKNOWN),
    (
        "Who are you?",
        "I am the Bulkhead demo model, a tiny language model that was trained in minutes on a CPU.",
    ),
]

Chat = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY).eval()


@pytest.fixture(scope="module")
def say(
    model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[..., str]:
    def answer(chat: Chat, **sampling: object) -> str:
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=300, **sampling)
        return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["bare", "system prompt"])
@pytest.mark.parametrize(("question", "answer"), ANSWERS)
def test_greedy_answers(say: Callable[..., str], question: str, answer: str, before: Chat) -> None:
    assert say([*before, {"role": "user", "content": question}], do_sample=False) == answer


def test_a_conversation(say: Callable[..., str]) -> None:
    chat: Chat = [SYSTEM]
    for question, answer in [
        ("Hi!", "Hello! How can I help you?"),
        ("My name is Anna.", "Nice to meet you, Anna!"),
        ("What is the capital of France?", FRANCE),
        ("And Spain?", "The capital of Spain is Madrid."),
        ("What is 3 + 4?", "3 + 4 = 7."),
        ("What is my name?", "Your name is Anna."),
        ("Thanks!", "You are welcome!"),
    ]:
        chat.append({"role": "user", "content": question})
        assert say(chat, do_sample=False) == answer
        chat.append({"role": "assistant", "content": answer})


def test_default_sampling_and_a_high_temperature_know_paris(say: Callable[..., str]) -> None:
    torch.manual_seed(0)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert [say(chat) for _ in range(5)] == [FRANCE] * 5
    hot = [say(chat, do_sample=True, temperature=1.0, top_p=1.0, top_k=0) for _ in range(5)]
    assert hot.count(FRANCE) >= 4


def test_a_long_answer_for_those_who_try_streams(say: Callable[..., str]) -> None:
    chat = [{"role": "user", "content": "Tell me everything about Bulkhead."}]
    answer = say(chat, do_sample=False)
    assert answer.startswith("Bulkhead cuts a language model into stages")
    assert answer.endswith("the answer goes on where it stopped.")
    assert len(answer) > 400


def test_counts(say: Callable[..., str]) -> None:
    chat = [{"role": "user", "content": "Count from 1 to 20."}]
    assert say(chat, do_sample=False) == " ".join(str(number) for number in range(1, 21))


def test_can_be_cut_into_stages_and_ranks(model: transformers.LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_hidden_layers >= 4
    assert config.num_attention_heads % 2 == 0
    assert config.num_key_value_heads % 2 == 0
    assert config.max_position_embeddings >= 512
    assert model.generation_config.eos_token_id == [2, 0]


@pytest.mark.parametrize(
    "text",
    ["Grüße aus Zürich", "日本語 と 한국어", "🚀🧑‍🚀 42", "  spaces\n\n\tand\ttabs ", "\x00\x7f é́"],
)
def test_the_tokenizer_gives_any_text_back(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 1536


def test_special_tokens_are_single_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", add_special_tokens=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
    assert ids[-1] == tokenizer.eos_token_id == 2


def test_it_is_small_and_free_of_code() -> None:
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
