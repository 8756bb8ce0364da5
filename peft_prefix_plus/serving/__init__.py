"""
Serving adapters, each as a model of an OpenAI-compatible server.

In vLLM: `connector`, `additive` and `store` run in vLLM's engine and workers and do not need PEFT. `endpoints` runs in its
HTTP server. `folding` prepares the adapters and `vllm_server` starts the server. Only `connector` and `endpoints` import
vLLM.

In transformers: `adapted_model` holds the adapters, `batcher` runs it, `decoding` and `text_stream` handle each row, and
`transformers_app` and `transformers_server` answer the requests.

Both use `openai_protocol` and `adapter_files`. `left_padding` is also for the command that generates. May import everything
but `insight`, `training` and `cli`; nothing but `cli` imports it.
"""
