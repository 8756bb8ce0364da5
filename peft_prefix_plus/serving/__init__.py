"""
Serving adapters in vLLM: what is folded from a saved adapter, where it lies, and the parts that run in vLLM's processes.

`store` and `connector` run in vLLM's engine and workers: they import torch, safetensors and vLLM, and nothing else of this package.
`folding` makes what they read. `endpoints` is vLLM's HTTP server's part. Nothing outside `serving/` and the command imports from here,
and vLLM is imported by `connector` and `endpoints` only.
"""
