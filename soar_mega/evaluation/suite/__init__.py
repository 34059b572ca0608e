"""An evaluation of many images: prompts, drawing that goes on where it was, scores, their statistics, the report."""
