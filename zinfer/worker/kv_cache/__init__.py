"""Keep the KV cache off the device, for any transformers model, without changing the model.

In: a kv_cache configuration and a model. Out: a transformers Cache whose keys and values live in
host memory. `host` copies a layer's cache back to the device one layer ahead of its use.
`host_attention` never copies it back: the query goes to the host, the attention output returns.
"""
