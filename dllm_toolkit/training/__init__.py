"""Training: objectives, corruptors, LoRA, and a thin Lightning module around them.

Import the modules you need; this package imports none of them, so that `import dllm_toolkit` stays free of Lightning and PEFT.
"""
