"""The optimizer step on flat buffers: accumulate, measure, check, clip, AdamW, average and clear in two passes."""
