"""Serving adapters in vLLM: what is folded from a saved adapter, where it lies, and the parts that run in vLLM's processes.
`connector`, `additive` and `store` run in vLLM's engine and workers and need nothing of PEFT; `endpoints` runs in its HTTP server;
`folding` and `vllm_server` make and start what they need. vLLM is imported by `connector` and `endpoints` only. May import everything
but `insight`, `training` and `cli`; nothing but `cli` imports it."""
