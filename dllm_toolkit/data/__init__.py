"""Data: the generated word problems that the small models are trained and measured on.

`dllm_toolkit.data.stories` is the generator with its graders, `dllm_toolkit.data.templates` holds the
wording, and `dllm_toolkit.data.tokenizer` the vocabulary. Nothing is imported here, so that `import
dllm_toolkit` stays light.
"""
