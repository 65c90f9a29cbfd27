"""The model room: the only one that knows Transformers' insides. Opens, reads, edits, replays, bakes and patches models."""
