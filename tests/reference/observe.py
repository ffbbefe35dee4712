"""diffusers' cross-attention with its probabilities kept, and CLIP's table with learned rows."""
import torch


class Observer:
    """Replaces the processor of every cross-attention; `maps[name]` is [B, heads, h*w, 77] after a run."""

    def __init__(self, unet):
        self.maps = {}
        processors = dict(unet.attn_processors)
        for name in processors:
            if ".attn2." in name:
                processors[name] = Processor(self, name.removesuffix(".processor"))
        unet.set_attn_processor(processors)


class Processor:
    """softmax(Q K^T / sqrt(d)) V, written out."""

    def __init__(self, observer, name):
        self.observer, self.name = observer, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q = heads(attn.to_q(hidden_states))
        k = heads(attn.to_k(encoder_hidden_states))
        v = heads(attn.to_v(encoder_hidden_states))
        probabilities = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        self.observer.maps[self.name] = probabilities
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(-2))


class LearnedRows(torch.nn.Module):
    """The frozen token table with trainable rows after its last."""

    def __init__(self, table, rows):
        super().__init__()
        self.table, self.rows = table, rows

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, torch.cat([self.table, self.rows]))


def encode(text_encoder, ids, rows=None):
    """Text embeddings [1, 77, D]; ids past the table are `rows`."""
    if rows is None:
        return text_encoder(ids).last_hidden_state
    plain = text_encoder.get_input_embeddings()
    text_encoder.set_input_embeddings(LearnedRows(plain.weight.detach(), rows))
    try:
        return text_encoder(ids).last_hidden_state
    finally:
        text_encoder.set_input_embeddings(plain)
