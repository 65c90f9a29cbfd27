"""Sound: recordings of users, and networks with prediction heads that hear notes."""

from manyheads.audio.core.sounds import SoundFile, open_recording
from manyheads.audio.notes.transcribing import transcribe

__all__ = ["SoundFile", "open_recording", "transcribe"]
