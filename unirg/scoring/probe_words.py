"""The words that the probes write: invented sentences, opposite severities, opposite sides, synonyms."""

# Finding -> a sentence that affirms it; what "a finding invented" and "findings spammed" add, and a draft's false one.
INVENTED: dict[str, str] = {
    "effusion": "There is a moderate right pleural effusion.",
    "pneumothorax": "There is a small left apical pneumothorax.",
    "nodule": "There is a nodule in the right upper lobe.",
    "edema": "There is moderate pulmonary edema.",
    "consolidation": "There is consolidation in the left lower lobe.",
    "cardiomegaly": "The heart is moderately enlarged.",
    "atelectasis": "There is atelectasis at the left base.",
    "opacity": "There is an opacity in the right mid lung.",
    "fracture": "There is an acute fracture of a right rib.",
    "emphysema": "There is severe emphysema.",
}

# Findings that one shadow may be called by: where one is said, inventing another is no clean lie.
AIRSPACE = frozenset(("opacity", "consolidation", "atelectasis", "pneumonia", "infection", "infiltrate", "aspiration"))

STOCK_NORMAL = (
    "Findings: The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax."
)
"""The template where no reference is normal."""

SIDES = {"left": "right", "right": "left", "leftward": "rightward", "rightward": "leftward", "lt": "rt", "rt": "lt"}

SEVERITIES = {
    "trace": "large",
    "tiny": "large",
    "minimal": "severe",
    "minimally": "severely",
    "slight": "severe",
    "slightly": "severely",
    "mild": "severe",
    "mildly": "severely",
    "small": "large",
    "moderate": "minimal",
    "moderately": "minimally",
    "large": "small",
    "massive": "small",
    "marked": "mild",
    "markedly": "mildly",
    "severe": "mild",
    "severely": "mildly",
}

# Phrase -> another way to say it. Each is tried by itself and kept only where the report reader then reads the same
# statements. A weak paraphrase: words change, the order of sentences and most of their build do not.
SYNONYMS: dict[str, str] = {
    "there is no evidence of": "no sign of",
    "there is no": "no evidence of",
    "the heart is normal in size": "cardiac size is within normal limits",
    "the heart is normal size": "cardiac size is within normal limits",
    "heart size is within normal limits": "the heart is not enlarged",
    "heart size is normal": "the heart is not enlarged",
    "heart size normal": "the heart is not enlarged",
    "normal heart size": "the heart is not enlarged",
    "heart size": "cardiac size",
    "heart is": "cardiac silhouette is",
    "cardiac silhouette": "heart shadow",
    "cardiomediastinal silhouette": "cardiomediastinal contour",
    "cardiomegaly": "cardiac enlargement",
    "lungs are clear": "lungs are free of disease",
    "pleural effusions": "pleural fluid collections",
    "pleural effusion": "pleural fluid collection",
    "opacity": "opacification",
    "opacities": "opacifications",
    "atelectasis": "atelectatic change",
    "airspace disease": "airspace process",
    "air space disease": "airspace process",
    "osseous structures": "bones",
    "bony structures": "bones",
    "degenerative changes": "degenerative disease",
    "central venous catheter": "central line",
    "pacemaker": "pacing device",
    "within normal limits": "normal",
    "unremarkable": "normal",
    "is seen": "is identified",
    "are seen": "are identified",
    "is noted": "is seen",
    "are noted": "are seen",
    "is present": "is noted",
    "are present": "are noted",
    "is in place": "is noted",
    "lower lobe": "lower lung zone",
    "upper lobe": "upper lung zone",
    "large": "sizable",
    "tiny": "trace",
    "severe": "marked",
    "severely": "markedly",
    "demonstrates": "shows",
    "demonstrate": "show",
    "visualized": "seen",
}
