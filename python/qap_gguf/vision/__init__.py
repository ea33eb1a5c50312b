"""From a picture to rows: loading, sizes, encoder, embeddings and their cache."""
