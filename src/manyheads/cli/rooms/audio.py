"""`manyheads audio`: the notes of a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Commands, Force, refuse, say, terminal

audio_app = typer.Typer(
    cls=Commands,
    help="Sound: what networks hear in recordings.",
    no_args_is_help=True,
)


@audio_app.command("notes")
def audio_notes(
    file: Annotated[Path, typer.Argument(help="A recording, .wav of any rate, mono or stereo, any length.")],
    out: Annotated[Path, typer.Option(help="Write the notes into this new MIDI file.")],
    onset: Annotated[float, typer.Option(min=0, max=1, help="From which probability a note begins.")] = 0.5,
    frame: Annotated[float, typer.Option(min=0, max=1, help="Above which probability it goes on.")] = 0.3,
    page: Annotated[Path | None, typer.Option(help="Draw a piano roll on this page, one HTML file.")] = None,
    force: Force = False,
) -> None:
    """The notes of any recording as a MIDI file, by the published Basic Pitch (#64). Offline; the weights come with us."""
    for path in (out, page):
        refuse(path, force=force, inputs=[file], folder=False)
    from manyheads.audio.core.sounds import open_recording
    from manyheads.audio.notes.decoding import NoteDecoding
    from manyheads.audio.notes.transcribing import transcribe, write_midi
    from manyheads.progress import progressing

    recording = open_recording(file)
    for warning in recording.warnings():
        say(warning)
    with progressing() as bar:
        heard = transcribe(recording, how=NoteDecoding(onset=onset, frame=frame), bar=bar)
    write_midi(out, heard.notes, force=force)
    pitches = sorted({note.pitch for note in heard.notes})
    between = f", MIDI pitches {pitches[0]} to {pitches[-1]}" if pitches else ""
    terminal().print(Text(f"{len(heard.notes)} notes in {recording.seconds:.1f} seconds{between}. Wrote {out}."))
    if page is not None:
        terminal().print(Text(f"Wrote {heard.report(page, force=force)}."))
