"""What verification does with an output: files, weights, layers and answers, judged, and causes named."""
