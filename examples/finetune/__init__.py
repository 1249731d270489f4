"""Parts of examples/finetune_efficientnet.py."""
