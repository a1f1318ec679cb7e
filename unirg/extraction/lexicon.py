"""What the extractor can find, and the phrases that name it (see `phrases.py` for the template language).

The wording grew from the CheXpert labeler's phrase lists (MIT; notice in NOTICE) and from how reports are written.
A name joined by `+` means that the phrase states several findings. Add a line here to teach a new phrase; a new name
becomes part of `FINDINGS` by itself.
"""

_SIDE = "right|left|bilateral|both|lateral|posterior"
_ANGLE = "angle|angles|sulcus|sulci|recess|recesses|xxxx"
_TUBE = "endotracheal|tracheostomy|nasogastric|orogastric|enteric|feeding|chest|ng|og|et|pleural|thoracostomy|dobhoff"
_CHEST = "cardiopulmonary|cardiothoracic|intrathoracic|cardiac|pulmonary|chest|thoracic|pleuropulmonary|lung"
_BONE = "osseous|bony|bone|skeletal|rib"
_PROCESS = "abnormality|abnormalities|process|processes|finding|findings|disease|diseases|pathology|change|changes"

PHRASES: dict[str, str] = {
    "atelectasis": """
        atelectasis|atelectases|atelectatic
        lung|lobar|lobe|basilar|base|segmental collapse
        partial|complete collapse
        collapse|collapsed
    """,
    "volume_loss": "volume loss\nloss of volume",
    "cardiomegaly": """
        cardiomegaly|megalocardia
        cardiac|heart|ventricular|biventricular enlargement
        atrial enlargement
        enlargement of the? heart
        enlargement of the? cardiac silhouette|shadow
        enlargement of the? cardiopericardial silhouette
        cardiac prominence
        prominence of the? heart
        prominence of the? cardiac silhouette
        increase|increased in? heart size
        increase in size of the? cardiac silhouette
    """,
    "consolidation": """
        consolidation|consolidations|consolidative|consolidated|consolidating
    """,
    "edema": """
        edema|oedema
        pulmonary|alveolar|interstitial edema|oedema
        kerley b? line|lines
    """,
    "heart_failure": """
        heart failure
        overt? failure
        chf
        cardiac|cardiogenic failure|decompensation
        congestive heart? failure
        congestive changes
    """,
    "congestion": """
        congestion
        pulmonary? vascular|venous congestion|engorgement|prominence|redistribution|hypertension
        pulmonary congestion|engorgement
        fluid|volume overload
        septal lines
        indistinct vascular margins|margination
        cephalization
        cephalisation
        prominence of the? central? pulmonary? vasculature|vascularity|vessels
    """,
    "effusion": """
        effusion|effusions
        pleural|parapneumonic|subpulmonic|hydro effusion|effusions
        pleural|pleuro fluid
        fluid collection|collections in both? the? pleural space|spaces
        fluid in the? pleural space|spaces|cavity
        fluid in the? fissure|fissures
        hydrothorax|hemothorax|haemothorax
    """,
    "pericardial_effusion": "pericardial effusion|effusions|fluid",
    "blunted_angle": f"""
        blunting|blunted of? the? {_SIDE}? {_SIDE}? costophrenic|cp {_ANGLE}
        costophrenic|cp {_ANGLE} blunting
    """,
    "effusion+pneumothorax": """
        hydropneumothorax|hemopneumothorax|hydropneumothoraces
    """,
    "emphysema": """
        emphysema|emphysematous
    """,
    "copd": """
        copd
        chronic obstructive pulmonary|lung|airway|airways? disease
    """,
    "bulla": "emphysematous? bulla|bullae|bullous|bleb|blebs",
    "hyperinflation": """
        hyperinflation|hyperinflated|hyperexpansion|hyperexpanded|overinflated|overinflation|hyperaeration|hyperaerated
        hyper inflation|inflated|expansion|expanded
        flattening|flattened of? the? bilateral? diaphragm|diaphragms|hemidiaphragm|hemidiaphragms
        air trapping
    """,
    "enlarged_mediastinum": """
        mediastinal|cardiomediastinal widening|enlargement|prominence
        mediastinal mass
        widening|enlargement|prominence of the? superior|upper? mediastinum
        widened|enlarged|prominent superior|upper? mediastinum
    """,
    "lymphadenopathy": """
        adenopathy|lymphadenopathy
        enlarged lymph node|nodes|xxxx
    """,
    "hilar_enlargement": """
        hilar prominence|enlargement|fullness
        prominence|enlargement|fullness of the? right|left|bilateral? hilum|hila
    """,
    "fibrosis": """
        fibrosis|fibrotic
        honeycombing
    """,
    "interstitial_disease": "interstitial lung? disease",
    "cystic_fibrosis": "cystic fibrosis",
    "scarring": """
        scar|scars|scarring|scarred
        parenchymal scar|scarring
        cicatricial
    """,
    "pleural_scarring": """
        pleural|pleuroparenchymal|pleuropericardial scar|scarring|changes
        pleuro|pleural parenchymal|pericardial? scar|scarring
    """,
    "pleural_thickening": """
        pleural|pleuro|fissural|apical|biapical thickening
        thickening of the? pleura
        thickened pleura
        fibrothorax
        pleural plaque|plaques|cap
        apical cap|capping
    """,
    "pneumonia": """
        pneumonia|pneumonias|pneumonic|bronchopneumonia
        pneumonitis
    """,
    "infection": """
        infection|infectious
        infectious process|etiology
        tuberculosis|histoplasmosis|abscess
    """,
    "pneumothorax": """
        pneumothorax|pneumothoraces|pneumothoraxes|ptx
    """,
    "infiltrate": """
        infiltrate|infiltrates|infiltration|infiltrations
    """,
    "opacity": """
        opacity|opacities|opacification|opacifications|opacified
        airspace|alveolar|parenchymal disease|process
        air space disease|process
        increased|abnormal density|densities
        density|densities
        haze|haziness|hazy
        reticular|reticulonodular|interstitial pattern
        reticular|reticulonodular markings|changes
        reticulation|reticulations
        interstitial|bronchovascular prominence|thickening|abnormality|changes
        prominence of the? interstitium
        increased|prominent|coarse|coarsened interstitial|bronchovascular|lung markings
    """,
    "aspiration": """
        aspiration
    """,
    "mass": """
        mass|masses|masslike
    """,
    "malignancy": """
        neoplasm|neoplasms|neoplastic|tumor|tumors|tumour|malignancy|malignancies|malignant|carcinoma|cancer
        metastasis|metastases|metastatic
        metastatic|malignant|neoplastic disease|process
    """,
    "lesion": """
        lung|pulmonary|cavitary lesion|lesions
    """,
    "nodule": """
        nodule|nodules|nodular|nodularity
        nodule|nodules / mass
        calcified? nodule|nodules
    """,
    "nodular_opacity": "nodular density|densities|opacity|opacities|opacification|shadow|shadows",
    "granuloma": """
        calcified right|left|bilateral? hilar|mediastinal|perihilar? lymph node|nodes|xxxx
        calcified right|left|bilateral? hilar|mediastinal|perihilar node|nodes|xxxx
        hilar|mediastinal|nodal calcification|calcifications
        granuloma|granulomas|granulomata|granulomatous
        calcified? granuloma|granulomas|granulomata
        granulomatous disease|process|change|changes|infection|sequela|sequelae
    """,
    "cavity": """
        cavity|cavities|cavitation|cavitary
    """,
    "bronchial_thickening": """
        peribronchial|bronchial cuffing|thickening
        bronchial wall thickening
        cuffing
    """,
    "airway_disease": """
        bronchitis|bronchiolitis|bronchospasm|asthma
        reactive|small? airway|airways disease
    """,
    "contusion": "contusion|contusions|hemorrhage|haemorrhage|hematoma|haematoma",
    "pulmonary_hypertension": "pulmonary arterial|artery? hypertension",
    "bronchiectasis": """
        bronchiectasis|bronchiectatic
    """,
    "hernia": """
        hernia|hernias
        hiatal|hiatus|diaphragmatic hernia
    """,
    "elevated_diaphragm": """
        eventration
        eventration of the? right|left? hemidiaphragm|diaphragm
        elevation of the? right|left? hemidiaphragm|diaphragm
        diaphragmatic|hemidiaphragm|hemidiaphragmatic elevation
    """,
    "fracture": """
        fracture|fractures|fractured
        compression fracture|fractures|deformity|deformities
        rib|vertebral deformity|deformities
        dislocation
    """,
    "deformity": "deformity|deformities",
    "degenerative_change": """
        degenerative|degeneration|spondylosis|osteophyte|osteophytes|osteophytosis|arthritis|arthritic|arthrosis|osteoarthritis
        degenerative change|changes|disease
        degenerative joint|disc|disk disease|changes
        spur|spurs|spurring|syndesmophytes
        endplate|arthritic|hypertrophic change|changes
    """,
    "osteopenia": """
        osteopenia|osteopenic|osteoporosis|osteoporotic|demineralization|demineralized
    """,
    "scoliosis": """
        scoliosis|scoliotic|dextroscoliosis|levoscoliosis|dextrocurvature|levocurvature|kyphoscoliosis
        spinal|spine|thoracolumbar|thoracic curvature
        curvature of the? thoracic|thoracolumbar|lumbar? spine
    """,
    "kyphosis": """
        kyphosis|kyphotic
    """,
    "aortic_calcification": """
        atherosclerosis|atherosclerotic|arteriosclerosis|arteriosclerotic
        aortic|vascular|arch calcification|calcifications|atherosclerosis
        calcification|calcifications of the? thoracic? aorta
        calcification|calcifications of the? aortic arch|knob
    """,
    "aortic_tortuosity": """
        aortic tortuosity|ectasia|unfolding|aneurysm|dilatation|dilation|enlargement
        tortuosity|ectasia|unfolding
    """,
    "pneumomediastinum": """
        pneumomediastinum
        mediastinal air|emphysema
    """,
    "pneumoperitoneum": """
        pneumoperitoneum
        free intraperitoneal|peritoneal|subdiaphragmatic? air
        free air
    """,
    "subcutaneous_emphysema": """
        subcutaneous|soft emphysema|air|gas
        soft tissue emphysema|air|gas
    """,
    "low_lung_volumes": """
        low|lower|decreased|diminished|reduced|small|shallow lung volume|volumes
        low inspiratory volume|volumes
        hypoinflation|hypoinflated|hypoventilation|hypoventilatory|underinflation|underinflated
        shallow|poor inspiration
        poor inspiratory effort
    """,
    "device_malposition": """
        malpositioned|mispositioned|malposition|misplaced|malpositioning
        terminates|terminating|terminated in|within the? right|left main? bronchus
        tip in|within the? right|left main|mainstem? bronchus
        right|left mainstem|main bronchus|bronchial? intubation
    """,
    "device": f"""
        tube|tubes|catheter|catheters|line|lines|picc|port|mediport|portacath
        pacemaker|defibrillator|icd|aicd|stent|stents
        {_TUBE} tube|tubes
        ett|ngt|ogt|tracheostomy|dobhoff
        central venous? line|lines|catheter|catheters
        picc|dialysis|pleural|drainage|swan|pulmonary|ganz|port line|catheter|catheters
        chest port
        port a cath
        swan ganz? catheter?
        pacing|pacer|icd|pacemaker lead|leads|wire|wires|device
        pacer|pacers|leads|wires|drain|drains|hardware|prosthesis|prostheses|device|devices
        support devices|apparatus|lines
        sternotomy|sternal|median wire|wires
        sternotomy wire|wires|xxxx and clips
        valve replacement|prosthesis
        prosthetic|artificial valve
        surgical|vascular|mediastinal? clip|clips
        staples|sutures|screws|screw|rods|coil|coils|valve|valves|plate|plates|cannula|cannulas
        monitoring leads|devices
        cardiac device|generator
        stimulator|stimulators|generator|shunt|anchor|anchors|occluder
        shunt tubing|catheter
        intra aortic balloon pump
        arthroplasty
    """,
    "postsurgical_change": """
        postsurgical|postoperative|surgical change|changes
        post surgical|operative change|changes
        sternotomy|thoracotomy|lobectomy|pneumonectomy|mastectomy|cabg|bypass
        median sternotomy
        bypass graft|grafting|surgery
    """,
    "pulmonary_artery_enlargement": """
        enlarged|prominent|dilated main|central? pulmonary artery|arteries
        enlargement|prominence of the? main|central? pulmonary artery|arteries
    """,
}

# Phrases that state a finding with a polarity of their own; a denial before them turns it round.
STATED: dict[tuple[str, str], str] = {
    ("device_malposition", "negative"): """
        well|appropriately|adequately|satisfactorily|properly positioned|placed|located
        in? satisfactory|good|appropriate|adequate|standard|expected|proper|acceptable position|positions|positioning
        in well positioned
        cm|centimeters above the? carina
        above the? carina
        tip|tips in|at|within|over|overlying|terminates|projecting the? lower|upper|mid|distal|proximal? svc
        tip|tips in|at|within|over|overlying the? cavoatrial|caval junction
        tip|tips in|at|within|over|overlying the? superior vena cava
    """,
    ("pneumothorax", "uncertain"): "lucency at|in|of the? right|left? apex\nright|left? apical lucency",
}

# Words too general to state a finding, that still deny one: "no acute cardiopulmonary process", "no osseous lesion".
DENIED_ONLY: dict[str, str] = {
    "abnormality": f"""
        acute|active|significant {_CHEST}? {_PROCESS}
        {_CHEST} {_PROCESS}
        abnormality|abnormalities
        acute|active cardiopulmonary|cardiac and|or? pulmonary|pleural|lung {_PROCESS}
    """,
    "fracture": f"acute|focal|suspicious|aggressive|destructive? {_BONE} {_PROCESS}|lesion|lesions|injury|injuries",
}

FINDINGS: tuple[str, ...] = (
    *dict.fromkeys(name for key in PHRASES for name in key.split("+")),
    "abnormality",
)
