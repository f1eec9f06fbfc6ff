"""Chain of thought: training rows, teachers that write rationales, segments of them, anchors."""
