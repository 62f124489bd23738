"""Chat templates of ours."""

# For checkpoints that were trained on no dialogues, such as the demo's: what was said, one message behind the other.
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"
