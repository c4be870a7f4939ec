"""The model families, one readable file each. Installed and imported as `unsloth_core.models`."""

if __name__ != "unsloth_core.models":
    # Imported as plain `models` too, every class here would exist twice, and isinstance would lie.
    raise ImportError(
        f"models: imported as {__name__!r}, expected 'unsloth_core.models'; import that"
    )
