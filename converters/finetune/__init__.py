"""Fine-tuning: a trained net for other classes, or for its own int8 form."""

from converters.finetune.head import with_new_head

__all__ = ["with_new_head"]
