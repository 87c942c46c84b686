"""The Krea 2 network in plain PyTorch. Imports torch and safetensors only."""
