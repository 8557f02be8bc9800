"""`make families`: every model type that transformers calls causal or image-text-to-text, tried.

A small model of each is built from the family's own default config, quantized as the product does it,
loaded as its card says, and compared with torchao's own quantization of it in memory, without a network.
"""
