"""Serving adapters, each as a model of an OpenAI-compatible server. In vLLM: `connector`, `additive` and `store` run in vLLM's engine and
workers and need nothing of PEFT; `endpoints` runs in its HTTP server; `folding` and `vllm_server` make and start what they need. vLLM is
imported by `connector` and `endpoints` only. In transformers: `adapted_model` has the adapters, `batcher` runs it, row by row as
`decoding` and `text_stream` say, and `transformers_app` and `transformers_server` answer. `openai_protocol` and `adapter_files` are for
both. May import everything
but `insight`, `training` and `cli`; nothing but `cli` imports it."""
