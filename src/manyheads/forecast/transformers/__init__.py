"""Series trunks with attention heads: they are opened, read and edited like any other model."""
