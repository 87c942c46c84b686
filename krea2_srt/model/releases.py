"""Names of the releases of Krea 2, of the repos beside them, and of their files. Needs no torch."""

CLASS_NAME = "Krea2Pipeline"
"""In ``model_index.json``."""

RELEASES = {"oss_turbo": "krea/Krea-2-Turbo", "oss_raw": "krea/Krea-2-Raw"}
"""The original code's names, and the repos that hold the same weights."""

TEXT_ENCODER_REPO = "Qwen/Qwen3-VL-4B-Instruct"
VAE_REPO = "Qwen/Qwen-Image"
"""Where the parts come from that a single file is without."""

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
"""How a part's files are called, in the order in which parts are loaded."""

SUFFIXES = (".safetensors", ".gguf")
"""How single files end."""
