"""LoRA adapters: files of every common trainer, read strictly. Torch and safetensors only."""
