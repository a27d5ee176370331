"""What is kept of a conversation on disk: everything, in any order; what is no content changes no hash."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.store import ConversationStore

words = st.text(max_size=8)
conversations = st.builds(
    Conversation,
    messages=st.tuples(st.builds(Message, st.just("user"), words), st.builds(Message, st.just("assistant"), words)),
    task=words,
    template=words,
    choices=st.lists(words, max_size=3).map(tuple),
    references=st.lists(words, max_size=3).map(tuple),
)


@given(st.lists(conversations, min_size=1, max_size=6))
def test_every_field_comes_back(given_: list[Conversation]) -> None:
    store = ConversationStore()
    for line, conversation in enumerate(given_, 1):
        store.append(conversation, source=line % 3, file="a.jsonl", line=line)
    for index in reversed(range(len(given_))):
        expected = replace(given_[index], source=(index + 1) % 3, file="a.jsonl", line=index + 1)
        assert store[index] == expected


@given(conversations)
def test_task_template_and_choices_are_no_content(conversation: Conversation) -> None:
    store = ConversationStore()
    plain = replace(conversation, task="", template="", choices=(), references=())
    for row in (conversation, plain):
        store.append(row, source=0, file="a.jsonl", line=1)
    assert store.digests[0] == store.digests[1] and store.prompts[0] == store.prompts[1]
