"""What a drafter checkpoint is on disk: its manifest, formats, verification and registry."""
