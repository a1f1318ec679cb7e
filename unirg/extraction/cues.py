"""Cues around findings: denial, doubt, clause ends, side, place, severity; and anatomy with what is said of it.

Templates as in `phrases.py`. Kinds (first column of `CUES`), with their reach inside one sentence:
- deny: what follows is absent, to the clause's end;  denied: what stands before is absent ("... is not seen");
- doubt: what follows is uncertain;                   doubted: what stands before is uncertain;
- either: both neighbours are uncertain ("atelectasis versus infiltrate");
- asked: what follows is a question or history, not a finding, and is left out ("rule out pneumonia");
- end: closes every reach;  with: closes denial once something was denied;  pass: nothing (hides a shorter cue).
"""

_SEEN = (
    "seen|identified|present|evident|visualized|visualised|appreciated|demonstrated|noted|detected|observed|apparent|"
    "found|visible|shown|suggested"
)
_ADJ = "significant|interval|definite|substantial|appreciable|gross"
_CHANGE = "change|changes|improvement|progression|worsening|increase|decrease"
_SHOW = "show|demonstrate|reveal|see|identify|have|appreciate|contain|suggest|include"
_BE = "is|are|was|were|has|have|been|be|being"

# A word that after a comma or "and" begins a new statement rather than goes on with a list.
FRESH = (
    "stable|unchanged|persistent|again|mild|small|minimal|tiny|trace|moderate|slight|new|old|chronic|there|the|"
    "bilateral|bibasilar|left|right|heart|lungs|calcified"
)

CUES: dict[str, str] = {
    "deny": f"""
        no|without|nor|neither|absence|denies|never|lack|lacks|none
        w / o
        no longer
        no evidence|sign|signs|indication|suggestion|radiographic|definite? evidence|sign|signs? of|for?
        no|without definite|convincing|radiographic|obvious|significant evidence|signs of|for
        no findings|finding to suggest|indicate
        no findings|finding suggestive|suspicious|concerning of|for
        no|not|without suspicious|suspicion for?
        not|doesn't|don't|didn't|cannot|can't {_SHOW}
        free|clear|cleared|devoid|absence|negative|resolution|clearing|removal of|for
        interval? resolution|clearing|removal of
        does|do|did not appear to be|represent|have
        fails to {_SHOW}
        rather than
        not suggestive|indicative|consistent|compatible of|with
        ruled out for
        unlikely to be|represent|reflect
    """,
    "denied": f"""
        not|never|isn't|aren't|wasn't|weren't be|been? definitely|definitively|otherwise|grossly? {_SEEN}
        no longer|more {_SEEN}
        not any? longer|more {_SEEN}
        absent
        has|have|had|is|are since|now|completely|entirely|essentially|largely? resolved|cleared|disappeared
        completely|now|since|interval resolved
        be|been|is|are|was|were ruled out
        been|is|are|was|were excluded|removed
        removed
        unlikely|doubtful
        is|are|was|were negative
    """,
    "doubt": """
        possible|possibly|probable|probably|questionable|question|equivocal|suspected|suspect|presumed|presumably|perhaps|potential|potentially|maybe
        may|might|could|can|would represent|reflect|be|indicate|suggest|have|include
        may|might|could
        may|might|could also? be|relate|related|due to?
        likely|suspicious|suspicion|concerning|concern|worrisome|suggesting|suggestive|suggests|suggest|favor|favored|favors|favoring
        raise|raises|raising concern|possibility|suspicion|question
        possibility|question|likelihood of
        cannot|can't|not|unable|difficult exclude
        cannot|can't|not|unable|difficult to? completely|entirely|definitely? exclude|rule
        cannot|can't rule|completely|entirely? out|exclude
        unable|difficult to exclude
        unable to rule out
        does not|can not exclude
        can not rule out
        not rule out
        possibly|likely|probably|perhaps|presumably|probable|xxxx due|secondary|related to
        may|might|could|can be secondary|due|related to
        in the appropriate|right|proper|correct clinical setting|context
        differential includes|include|considerations|diagnosis? includes|include?
        versus|vs
    """,
    "doubted": f"""
        cannot|can't|not|never be? completely|entirely|definitely|definitively|totally|confidently|reliably? excluded
        can not be? completely|entirely? excluded
        cannot|can't be ruled out
        can not be ruled out
        {_BE} not completely|entirely|definitely? excluded|ruled
        {_BE} not {_BE}? ruled out
        not excluded
        {_BE}? {_BE} possible|suspected|questioned|considered
        is|are a possibility|consideration
        should|could|may|might be considered|present|suspected
        may|might exist
    """,
    "asked": """
        rule out
        r / o
        evaluate|evaluation|eval|assess|assessment|check|look|looking|query for?
        to? exclude|evaluate|assess
        history of|for
        known history of
        h / o
        hx of
        concern for possible? history of
        patient has|with history of
        previous|prior|old history of
        at risk for
        could|may|might|can obscure|mask|hide
        detecting|detection of?
        follow up for
        recommend
    """,
    "end": """
        but|however|although|though|while|whereas|yet|except|which|nevertheless|nonetheless|because|therefore|otherwise
        aside|apart from
        other than
        with the? exception of
        secondary|due to
        there is|are|was|were|has|have
        there's
        as well as evidence of
        suggesting no
    """,
    "with": """
        with
        and there? is|are
    """,
    "pass": f"""
        no|without|little|not|minimal {_ADJ}? {_ADJ}? {_CHANGE} in|of|from|since|to?
        no|not significantly|substantially|appreciably? changed|different
        not only
        no doubt
        not well|fully|completely|clearly visualized|evaluated|seen|assessed|included
        consistent|compatible|associated|together|along|in keeping with
        in addition to
        no more than
        no further change
        no prior|previous|comparison|priors
        without comparison
        no other|additional
        lines of
        line of
        mid line
        in line
        tip of
    """,
    "not": "not|isn't|aren't|hardly",
    "or": """
        or|/
        and / or
    """,
    "and": """
        and|plus|also|as
        as well as
    """,
    "comma": ",|(|)|:|;",
    "verb": f"{_BE}|remains|remain|appears|appear|{_SEEN}",
}

# value: (side, place, severity); None leaves a part unsaid
SIDES: dict[str, str] = {
    "left": "left|leftward|lt",
    "right": "right|rightward|rt",
    "bilateral": "bilateral|bilaterally|both",
}
# Words that say a place on both sides.
BOTH_SIDES: dict[str, str] = {"base": "bibasilar|bibasal", "apex": "biapical", "perihilar": "bihilar"}
PLACES: dict[str, str] = {
    "upper lobe": "upper lobe|lobes|lung|lungs|zone|zones\nupper",
    "middle lobe": "middle|mid lobe|lobes|lung|lungs|zone|zones\nmidlung|midlungs|midzone\nmid lung zone|zones|field",
    "lower lobe": "lower lobe|lobes|lung|lungs|zone|zones\nlower",
    "lingula": "lingula|lingular",
    "base": "base|bases|basal|basilar|basally\nlung base|bases",
    "apex": "apex|apices|apical",
    "perihilar": "perihilar|parahilar|hilum|hila|hilar|suprahilar|infrahilar",
    "retrocardiac": "retrocardiac",
    "fissure": "fissure|fissures|fissural",
    "hemithorax": "hemithorax",
    "mediastinum": "paratracheal|paramediastinal",
    "rib": "rib|ribs",
    "clavicle": "clavicle|clavicles|clavicular",
    "spine": "spine|vertebral|vertebra|vertebrae",
    "shoulder": "shoulder|shoulders|humerus|humeral",
    "diffuse": "diffuse|diffusely|throughout",
}
SEVERITIES: dict[str, str] = {
    "trace": "trace|tiny|minute",
    "minimal": "minimal|minimally|subtle|slight|slightly|faint|trivial",
    "small": "small",
    "mild": "mild|mildly",
    "moderate": "moderate|moderately\nmoderate sized",
    "large": "large|massive|huge|significant|sizable|sizeable|significantly|considerable|gross",
    "severe": "severe|severely|marked|markedly|extensive|substantial",
}

# What is said of anatomy. `SAID[anatomy][predicate]` lists (finding, polarity) that the pair states.
ANATOMY: dict[str, str] = {
    "heart": """
        heart|cardiac
        heart size|sizes|shadow|contour|contours|border|borders|silhouette
        cardiac size|shadow|contour|contours|silhouette|borders|xxxx
        cardiac silhouette|contour size
        cardiopericardial silhouette
        size of the? heart
        size of the? cardiac silhouette
    """,
    "cardiomediastinum": """
        cardiomediastinal|cardio mediastinal? silhouette|silhouettes|contour|contours|structures|xxxx
        cardiomediastinum
        heart and mediastinum
        cardiac and|/ mediastinal silhouette|silhouettes|contour|contours|structures
        cardiac|heart size and mediastinal silhouette|contour|contours
    """,
    "mediastinum": """
        mediastinum|mediastinal
        mediastinal|mediastinum silhouette|contour|contours|structures|configuration|width|borders
        superior|upper mediastinum
    """,
    "lungs": """
        lungs|lung
        lung|pulmonary fields|field|zones|parenchyma
        lung xxxx
        pulmonary? airspaces
    """,
    "pleura": """
        pleura|pleural
        pleural space|spaces|surfaces|margins
    """,
    "angle": """
        costophrenic|cp|costophrenic angle|angles|sulcus|sulci|recess|recesses|xxxx
    """,
    "vessels": """
        pulmonary|central|lung? pulmonary|vascular? vasculature|vascularity|vessels|vasculatures
        pulmonary vascular markings|pattern
        vasculature|vascularity
        pulmonary xxxx
    """,
    "aorta": """
        aorta|aortic
        thoracic|ascending|descending? thoracic? aorta
        aortic arch|knob|contour|xxxx
    """,
    "hila": "hilar contours|structures|xxxx",
    "diaphragm": "diaphragm|diaphragms|hemidiaphragm|hemidiaphragms",
    "bones": """
        bones|skeleton|skeletal
        osseous|bony|skeletal structures|thorax|elements|xxxx
        visualized? osseous structures
        bony thorax
        osseous|bony structures
        bones|osseous and soft tissues|tissue structures?
    """,
    "markings": "interstitial|bronchovascular|lung|interstitium? markings\ninterstitium",
    "volumes": "lung? volume|volumes\npulmonary volume|volumes\ninspiration",
    "arteries": "main|central? pulmonary artery|arteries",
    "chest": """
        chest|exam|examination|study|radiograph|radiographs|film|films
        chest? x ray|rays
        chest exam|examination|study|radiograph|radiographs|film|films
    """,
}
PREDICATES: dict[str, str] = {
    "normal": """
        normal|unremarkable|negative|intact
        within|in normal limits|limit|range
        within limits of normal
        wnl
        normal in|of size|contour|appearance|configuration|caliber
        normal limits
        not remarkable
        normal size
        stable and? normal
        at|near? the? upper|high|top limits|limit|normal of? normal?
        upper|top normal
        top normal limits|size
    """,
    "clear": "clear\nwell aerated\nclear bilaterally\nfree of disease",
    "enlarged": "enlarged|enlargement|big|increased|enlarging",
    "prominent": "prominent|prominence|full|fullness|engorged|congested|distended|indistinct|plethoric",
    "borderline": """
        borderline enlarged|enlargement|large|prominent|increased?
        borderline in? size
        mildly prominent
    """,
    "widened": "widened|wide|widening",
    "tortuous": "tortuous|ectatic|unfolded|elongated|uncoiled|dilated|aneurysmal",
    "calcified": "calcified|calcification|calcifications",
    "elevated": "elevated|elevation|raised|eventrated",
    "flat": "flattened|flattening",
    "low": "low|decreased|diminished|reduced|shallow|poor",
    "blunted": "blunted|blunting|obscured|effaced",
    "sharp": "sharp|preserved|maintained",
    "thickened": "thickened|thickening",
}
_POS, _NEG, _UNC = "positive", "negative", "uncertain"
SAID: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "heart": {
        **dict.fromkeys(("enlarged", "widened", "prominent"), (("cardiomegaly", _POS),)),
        "borderline": (("cardiomegaly", _UNC),),
        "normal": (("cardiomegaly", _NEG),),
    },
    "cardiomediastinum": {
        **dict.fromkeys(("enlarged", "widened", "prominent"), (("enlarged_mediastinum", _POS), ("cardiomegaly", _POS))),
        "borderline": (("enlarged_mediastinum", _UNC), ("cardiomegaly", _UNC)),
        "normal": (("enlarged_mediastinum", _NEG), ("cardiomegaly", _NEG)),
    },
    "mediastinum": {
        **dict.fromkeys(("enlarged", "widened", "prominent"), (("enlarged_mediastinum", _POS),)),
        "borderline": (("enlarged_mediastinum", _UNC),),
        "normal": (("enlarged_mediastinum", _NEG),),
    },
    "lungs": dict.fromkeys(("normal", "clear"), (("opacity", _NEG),)),
    "pleura": {
        **dict.fromkeys(("normal", "clear"), (("effusion", _NEG),)),
        "thickened": (("pleural_thickening", _POS),),
    },
    "angle": {
        **dict.fromkeys(("normal", "clear", "sharp"), (("effusion", _NEG),)),
        "blunted": (("blunted_angle", _POS),),
    },
    "vessels": {
        **dict.fromkeys(("enlarged", "prominent"), (("congestion", _POS),)),
        "normal": (("congestion", _NEG),),
    },
    "aorta": {
        "tortuous": (("aortic_tortuosity", _POS),),
        "prominent": (("aortic_tortuosity", _POS),),
        "calcified": (("aortic_calcification", _POS),),
    },
    "hila": {
        **dict.fromkeys(("enlarged", "prominent"), (("hilar_enlargement", _POS),)),
        "normal": (("hilar_enlargement", _NEG),),
    },
    "diaphragm": {"elevated": (("elevated_diaphragm", _POS),), "flat": (("hyperinflation", _POS),)},
    "volumes": {"low": (("low_lung_volumes", _POS),), "normal": (("low_lung_volumes", _NEG),)},
    "arteries": {**dict.fromkeys(("enlarged", "prominent"), (("pulmonary_artery_enlargement", _POS),))},
    "bones": {"normal": (("fracture", _NEG),)},
    "markings": {**dict.fromkeys(("enlarged", "prominent"), (("opacity", _POS),))},
    "chest": dict.fromkeys(("normal", "clear"), (("abnormality", _NEG),)),
}
