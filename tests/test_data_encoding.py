"""Masks and prompts, held against TRL's own masks and the tokenizer's own rendering of the same conversations."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from conftest import trl_template

from qlora_kit.data.chat import (
    chat_template_sha256,
    control_tokens,
    render_prompt,
    render_prompts,
    stop_token_ids,
    template_system_prompt,
)
from qlora_kit.data.encoding import Encoded, encode_batch, encode_conversation, self_check
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.token_file import TokenWriter, open_tokens
from qlora_kit.data.tokenising import TokenRules, tokenise
from qlora_kit.errors import BaseModelError, DataError
from qlora_kit.formats import Example, Message

STOP = "<|im_end|>"


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    turns = tuple(Message(roles[index % 2], content) for index, content in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


CONVERSATIONS = [
    conversation("hello", "world"),
    conversation("hello", "world", system="Be nice."),
    conversation("one", "first answer", "two", "second\nanswer", "three", "x", system="s"),
    conversation("", "  indented\n    code()\n"),
    conversation("edges \n", "\n\nstarts with lines", "more", " ends with space \n\n"),
    conversation("accents é 你好 🙂", "naïve — résumé 🙂"),
    conversation("the answer", "the answer", "the answer", "the answer"),
]


def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def supervised_runs(encoded: Encoded) -> list[list[int]]:
    runs: list[list[int]] = []
    before = -100
    for label in encoded.labels:
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


def answers(messages: tuple[Message, ...]) -> list[str]:
    return [message.content for message in messages if message.role == "assistant"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_supervised_tokens_are_the_answers_and_their_stop_tokens(chatml_tokenizer, messages):
    encoded = encode_conversation(messages, chatml_tokenizer, loss_on="all_assistant")
    assert [chatml_tokenizer.decode(run) for run in supervised_runs(encoded)] == [a + STOP for a in answers(messages)]
    last = encode_conversation(messages, chatml_tokenizer, loss_on="last")
    assert [chatml_tokenizer.decode(run) for run in supervised_runs(last)] == [answers(messages)[-1] + STOP]
    assert last.input_ids == encoded.input_ids
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_each_answer_follows_exactly_the_prompt_of_generation(chatml_tokenizer, messages):
    encoded = encode_conversation(messages, chatml_tokenizer, loss_on="all_assistant")
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = render_prompt(messages[:turn], chatml_tokenizer)
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[len(prompt) - 1] == -100
            assert encoded.labels[len(prompt)] != -100


def test_ids_are_those_of_the_tokenizer_itself(chatml_tokenizer):
    """Whole conversation: the tokenizer's ids without the line break behind the last stop token."""
    newline = chatml_tokenizer("\n", add_special_tokens=False)["input_ids"]
    for messages in CONVERSATIONS:
        whole = chatml_tokenizer.apply_chat_template(plain(messages), tokenize=True, return_dict=False)
        ours = encode_conversation(messages, chatml_tokenizer, loss_on="last").input_ids
        assert chatml_tokenizer.decode(ours + newline) == chatml_tokenizer.decode(whole)
        if not any(answer.startswith("\n") for answer in answers(messages)):  # there the template's "\n" would merge
            assert ours + newline == whole
    first_turn = CONVERSATIONS[1][:2]
    own = chatml_tokenizer.apply_chat_template(
        plain(first_turn), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert render_prompt(first_turn, chatml_tokenizer) == own


def test_no_token_straddles_the_edge_of_an_answer(chatml_tokenizer):
    """Tokenised whole, "\\n" + "\\n" is one token: the prompt in training would not be the prompt in generation."""
    messages = conversation("question", "\nanswer")
    prompt = render_prompt(messages[:1], chatml_tokenizer)
    whole = chatml_tokenizer.apply_chat_template(plain(messages), tokenize=True, return_dict=False)
    assert whole[: len(prompt)] != prompt  # the fault that cutting avoids
    assert encode_conversation(messages, chatml_tokenizer, loss_on="last").input_ids[: len(prompt)] == prompt


def test_mask_equals_trl_assistant_mask_but_for_the_template_line_breaks(chatml_tokenizer):
    """TRL's training template marks "\\n" + answer + stop + "\\n" of each turn; ours is the same without the two."""
    template = trl_template("qwen2_5_training")
    for messages in CONVERSATIONS:
        if any(answer.startswith("\n") for answer in answers(messages)):
            continue
        theirs = chatml_tokenizer.apply_chat_template(
            plain(messages),
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = list(theirs["assistant_masks"])
        edges = [0, *mask, 0]
        starts = [i for i in range(len(mask)) if edges[i + 1] and not edges[i]]
        ends = [i for i in range(len(mask)) if edges[i + 1] and not edges[i + 2]]
        for i in starts + ends:
            assert chatml_tokenizer.decode([theirs["input_ids"][i]]) == "\n"
            mask[i] = 0
        expected = [token if on else -100 for token, on in zip(theirs["input_ids"], mask, strict=True)]
        ours = encode_conversation(messages, chatml_tokenizer, loss_on="all_assistant")
        assert theirs["input_ids"][-1:] == chatml_tokenizer("\n")["input_ids"]
        assert ours.input_ids == theirs["input_ids"][:-1]
        assert ours.labels == expected[:-1]


def trl_dataset(rows, tokenizer, tmp_path, **settings):
    """What TRL's own trainer makes of ``rows``."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)
    trainer = SFTTrainer(
        Qwen2ForCausalLM(config), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train_dataset


def test_labels_equal_trl_prompt_completion_preparation(chatml_tokenizer, tmp_path):
    """TRL supervises answer + stop + "\\n" there; ours is the same without that line break."""
    chosen = [messages for messages in CONVERSATIONS if not answers(messages)[-1].startswith("\n")]
    chosen = [messages for messages in chosen if not any(answer.startswith("\n") for answer in answers(messages))]
    rows = [{"prompt": plain(messages[:-1]), "completion": plain(messages[-1:])} for messages in chosen]
    for theirs, messages in zip(trl_dataset(rows, chatml_tokenizer, tmp_path), chosen, strict=True):
        ours = encode_conversation(messages, chatml_tokenizer, loss_on="last")
        assert ours.input_ids == theirs["input_ids"][:-1]
        assert ours.labels == theirs["labels"][:-1]


def test_trl_takes_the_encoded_rows_as_they_are(chatml_tokenizer, tmp_path):
    examples = [Example(messages, {}, f"f.jsonl:{n}") for n, messages in enumerate(CONVERSATIONS, 1)]
    rows = kept_rows(examples, chatml_tokenizer, TokenRules(512, "all_assistant", "stop"), Ledger())
    with TokenWriter(tmp_path / "train.arrow") as writer:
        writer.write(rows[:1])
        writer.write(rows[1:])
    data = open_tokens(tmp_path / "train.arrow")
    theirs = trl_dataset(list(data), chatml_tokenizer, tmp_path, max_length=512)
    assert theirs["input_ids"][:] == data["input_ids"][:] == [row.input_ids for row in rows]
    assert theirs["labels"][:] == data["labels"][:] == [row.labels for row in rows]


def test_random_conversations(chatml_tokenizer):
    """Answers of random white space, letters and punctuation decode to themselves behind their own prompt."""
    source = random.Random(0)
    alphabet = " \n\tab1.,'é{}"
    conversations = [
        conversation(*("".join(source.choices(alphabet, k=source.randint(1, 12))) + "z" for _ in range(4)))
        for _ in range(200)
    ]
    prompts = render_prompts([messages[:-1] for messages in conversations], chatml_tokenizer)
    for encoded, messages, prompt in zip(
        encode_batch(conversations, chatml_tokenizer, loss_on="last"), conversations, prompts, strict=True
    ):
        assert isinstance(encoded, Encoded)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels == [-100] * len(prompt) + encoded.input_ids[len(prompt) :]
        assert chatml_tokenizer.decode(encoded.input_ids[len(prompt) :]) == messages[-1].content + STOP


def test_batches_give_what_single_conversations_give(chatml_tokenizer):
    batch = encode_batch(CONVERSATIONS, chatml_tokenizer, loss_on="all_assistant")
    assert batch == [encode_conversation(m, chatml_tokenizer, loss_on="all_assistant") for m in CONVERSATIONS]


def test_stop_token_is_the_templates_and_not_the_eos(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token="<|endoftext|>")  # as Qwen2.5's base models have it
    assert stop_token_ids(tokenizer) == (tokenizer.convert_tokens_to_ids(STOP),)
    llama = make_tokenizer("llama3", "llama3", eos_token="<|end_of_text|>")
    assert stop_token_ids(llama) == (llama.convert_tokens_to_ids("<|eot_id|>"),)
    assert control_tokens(tokenizer) == ("<|endoftext|>", "<|im_end|>", "<|im_start|>")


def test_llama3_has_one_bos_and_a_stripped_answer(make_tokenizer):
    llama = make_tokenizer("llama3", "llama3", eos_token="<|eot_id|>")
    messages = conversation("hello", " padded answer \n", "again", "second", system="Rules.")
    encoded = encode_conversation(messages, llama, loss_on="all_assistant")
    assert encoded.input_ids.count(llama.bos_token_id) == 1
    assert render_prompt(messages[:2], llama).count(llama.bos_token_id) == 1
    assert [llama.decode(run) for run in supervised_runs(encoded)] == ["padded answer<|eot_id|>", "second<|eot_id|>"]
    assert encoded.input_ids == llama.apply_chat_template(plain(messages), tokenize=True, return_dict=False)


def test_qwen3_answers_behind_an_empty_thought(make_tokenizer):
    qwen3 = make_tokenizer("qwen", "qwen3", eos_token=STOP)
    messages = conversation("hello", "world", "again", "second")
    prompt = render_prompt(messages[:1], qwen3)
    assert qwen3.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    one = encode_conversation(messages[:2], qwen3, loss_on="all_assistant")
    assert [qwen3.decode(run) for run in supervised_runs(one)] == ["world<|im_end|>"]
    last = encode_conversation(messages, qwen3, loss_on="last")
    assert [qwen3.decode(run) for run in supervised_runs(last)] == ["second<|im_end|>"]
    assert last.input_ids[: len(render_prompt(messages[:3], qwen3))] == render_prompt(messages[:3], qwen3)
    with pytest.raises(DataError, match=r"turn 2: .* renders the turns before this answer differently"):
        encode_conversation(messages, qwen3, loss_on="all_assistant")  # it takes the thought out of earlier turns


def test_template_that_ends_turns_with_plain_text_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(BaseModelError, match="ends an assistant turn with"):
        stop_token_ids(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(BaseModelError, match="no chat template"):
        render_prompt(conversation("hello"), tokenizer)


def test_template_that_refuses_a_row_is_reported_with_its_row(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    tokenizer.chat_template = check + trl_template("qwen2_5")
    examples = [
        Example(conversation("q", "a"), {}, "f.jsonl:1"),
        Example(conversation("q", "a", system="s"), {}, "f.jsonl:2"),
    ]
    ledger = Ledger()
    rows = kept_rows(examples, tokenizer, TokenRules(99, "last", "stop"), ledger)
    assert len(rows) == 1
    (problem,) = ledger.problems
    assert (problem.file, problem.line) == ("f.jsonl", 2)
    assert "no system turn here" in problem.reason


def test_stop_token_inside_an_answer_is_refused(chatml_tokenizer):
    with pytest.raises(DataError, match="inside an answer"):
        encode_conversation(conversation("q", f"a{STOP}b"), chatml_tokenizer, loss_on="last")


def test_self_check_catches_a_template_that_rewrites_answers(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    from tokenizers import normalizers

    examples = [Example(conversation("q", "Answer"), {}, "f.jsonl:1")]
    self_check(examples, tokenizer, loss_on="last")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Answer", "")  # a tokenizer that loses text
    with pytest.raises(BaseModelError, match="decodes to"):
        self_check(examples, tokenizer, loss_on="last")


def test_template_hash_follows_what_is_rendered(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    before = chat_template_sha256(tokenizer)
    tokenizer.chat_template = "{# a comment #}" + trl_template("qwen2_5")
    assert chat_template_sha256(tokenizer) == before
    tokenizer.chat_template = trl_template("qwen2_5").replace("You are Qwen", "You are Kit")
    assert chat_template_sha256(tokenizer) != before


def kept_rows(examples, tokenizer, rules, ledger):
    """The rows that are left, of the split train."""
    return [row for batch in tokenise(examples, tokenizer, rules, ledger=ledger, split="train") for row in batch]


def overlength_rows(tokenizer):
    two_turns = conversation("one", "short", "two", "a rather long second answer " * 4)
    one_turn = conversation("one", "a rather long first answer " * 4)
    long_prompt = conversation("words " * 60, "short")
    fits = conversation("one", "short")
    rows = [two_turns, one_turn, long_prompt, fits]
    limit = len(encode_conversation(fits, tokenizer, loss_on="last").input_ids) + 12
    return [Example(messages, {}, f"f.jsonl:{n}") for n, messages in enumerate(rows, 1)], limit


def test_overlength_stop_lists_every_row(chatml_tokenizer):
    examples, limit = overlength_rows(chatml_tokenizer)
    ledger = Ledger()
    kept_rows(examples, chatml_tokenizer, TokenRules(limit, "all_assistant", "stop"), ledger)
    assert [problem.line for problem in ledger.stopping("drop")] == [1, 2, 3]


def test_overlength_drop_and_truncate_are_in_the_ledger(chatml_tokenizer):
    examples, limit = overlength_rows(chatml_tokenizer)
    ledger = Ledger()
    ledger.rows["train"] = 4
    (row,) = kept_rows(examples, chatml_tokenizer, TokenRules(limit, "all_assistant", "drop"), ledger)
    report = ledger.report()
    assert (report.rows, report.kept, report.dropped, report.truncated) == (4, 1, 3, 0)
    assert report.total_tokens == len(row.input_ids)
    assert report.supervised_tokens == sum(label != -100 for label in row.labels)

    ledger = Ledger()
    ledger.rows["train"] = 4
    rows = kept_rows(examples, chatml_tokenizer, TokenRules(limit, "all_assistant", "truncate"), ledger)
    whole_turn, cut, fits = (row.labels for row in rows)
    stop = stop_token_ids(chatml_tokenizer)[0]
    assert whole_turn[-1] == stop
    assert cut[-1] != stop
    assert fits[-1] == stop
    assert [len(whole_turn), len(cut)] == [len(fits), limit]
    assert ledger.lengths["train"] == Counter([len(fits), len(fits), limit])
    entries = list(ledger.entries)
    actions = [(entry.line, entry.action) for entry in entries]
    assert actions == [(1, "truncated"), (2, "truncated"), (3, "dropped")]
    assert "later turns" in entries[0].reason
    assert "the answer was cut" in entries[1].reason
    assert "stop token" in entries[1].reason
    assert "the prompt alone fills it" in entries[2].reason


def test_metaspace_tokenizer_is_cut_behind_an_anchor():
    """A sentencepiece-like tokenizer marks the start of each text; pieces must not get that mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["The answer is hello world. Question? Do you know?\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    messages = conversation("hello", "the answer", "Question?", "world")
    encoded = encode_conversation(messages, fast, loss_on="all_assistant")
    assert encoded.input_ids == fast.apply_chat_template(plain(messages), tokenize=True, return_dict=False)
    assert [fast.decode(run).strip() for run in supervised_runs(encoded)] == ["the answer</s>", "world</s>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ],
    ids=["mistral", "zephyr"],
)
def test_sentencepiece_answers_behind_plain_text_keep_their_tokens(make_sentencepiece_tokenizer, template):
    """This tokenizer marks every stretch between control tokens, but an answer inside such a stretch has no mark."""
    tokenizer = make_sentencepiece_tokenizer(template)
    messages = conversation("The question?", "the answer", "Another one?", "\u00e9t\u00e9: [1]")
    encoded = encode_conversation(messages, tokenizer, loss_on="all_assistant")
    whole = tokenizer.apply_chat_template(plain(messages), tokenize=True, return_dict=False)
    assert encoded.input_ids == whole[: len(encoded.input_ids)]
    runs = [tokenizer.decode(run).strip() for run in supervised_runs(encoded)]
    assert runs == ["the answer</s>", "\u00e9t\u00e9: [1]</s>"]


def test_an_answer_that_merges_with_the_text_before_it_is_refused(make_sentencepiece_tokenizer):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = make_sentencepiece_tokenizer(template)
    tokenizer.add_tokens(["\n The"])
    with pytest.raises(BaseModelError, match="start on a token boundary"):
        encode_conversation(conversation("A?", "The end"), tokenizer, loss_on="all_assistant")


def test_the_system_prompt_that_a_template_adds_is_found(make_tokenizer):
    qwen = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    own = template_system_prompt(qwen)
    assert own == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert render_prompt([Message("system", own), Message("user", "Hi")], qwen) == render_prompt(
        [Message("user", "Hi")], qwen
    )
    assert template_system_prompt(make_tokenizer("qwen", "qwen3", eos_token=STOP)) is None
    assert template_system_prompt(make_tokenizer("llama3", "llama3", eos_token="<|eot_id|>")) is None
    qwen.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + trl_template(
        "qwen2_5"
    )
    assert template_system_prompt(qwen) is None


def test_a_text_that_is_too_long_is_cut_and_told(chatml_tokenizer):
    text = Example((), {}, "f.jsonl:1", text="weather is nice today " * 20)
    ledger = Ledger()
    (row,) = kept_rows([text], chatml_tokenizer, TokenRules(30, "last", "truncate"), ledger)
    whole = chatml_tokenizer(text.text)["input_ids"]
    assert row.input_ids == whole[:30]
    assert row.labels == [-100, *whole[1:30]]
    (entry,) = ledger.entries
    assert entry.action == "truncated"
    assert f"the text was cut, its last {len(whole) + 1 - 30} tokens are lost" in entry.reason


def test_a_prompt_does_not_depend_on_the_day(make_tokenizer):
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + trl_template("qwen2_5")
    assert tokenizer.decode(render_prompt([Message("user", "Hi")], tokenizer)).startswith("26 July 2024")
