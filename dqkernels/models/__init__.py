"""Models of transformers as they run here: so far int8 attention as an attention implementation (`attention`)."""
