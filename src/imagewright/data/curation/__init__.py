"""Curation: which of many captioned (or labelled) pictures are shown, so that common things do not drown rare ones.

Xu et al. 2023 (MetaCLIP, 2309.16671) for one language, Chuang et al. 2025 (Meta CLIP 2, 2507.22062) for many: lists of
entries (`metadata`), which of them a caption holds (`matching`), how often each may be kept (`balancing`).
"""
