"""Mathematics of pictures and masks: values, borders, windows, sheets. No model, nothing else of the pack."""
