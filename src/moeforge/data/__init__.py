"""Text in: corpora of documents, tokenizers, packed sequences with document masks. Importing this loads no torch."""
