"""The fused path: the arithmetic of Qwen and Llama decoders without their modules, for answering requests."""
