"""The model's parts, in the order in which data meets them: encoder, tokenizers, multiview, dpt, heads, factors."""
