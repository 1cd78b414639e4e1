"""How a page looks: one style sheet, for a desk, a phone, paper and the dark, without a file from elsewhere.

Knows CSS. Knows nothing of what stands on a page.
"""

from __future__ import annotations

LIGHT = ("#3879c2", "#9f5f14", "#6e3bd9", "#c14c6b", "#184e72", "#b78d16", "#232b33", "#5c320b")
DARK = ("#5d87d3", "#d38852", "#9c73ff", "#c074af", "#62b8de", "#ba9e16", "#ade3fd", "#f6c2ac")
"""of lines, without a green: at least 3 : 1 against the page, and apart for those who see fewer colours
(tests/federated/reporting/test_page_style.py measures both)"""
PAPER, NIGHT = "#ffffff", "#14181f"
_SHADES = {
    "paper": (PAPER, NIGHT),
    "ink": ("#1b2330", "#e4e8ee"),
    "soft": ("#566072", "#9fa9b8"),
    "hair": ("#dfe4eb", "#2c3440"),
    "wash": ("#f5f7fa", "#1b212b"),
    "better": ("#1f5fa8", "#7db1f0"),
    "worse": ("#a8401a", "#f0926a"),
}


def variables(*, dark: bool = False) -> str:
    """The colours by name."""
    lines = {f"s{number}": colour for number, colour in enumerate(DARK if dark else LIGHT)}
    return "".join(f"--{name}:{value};" for name, value in ({n: s[dark] for n, s in _SHADES.items()} | lines).items())


CHART = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink);unicode-bidi:isolate}"
    ".tick{fill:var(--soft);font-variant-numeric:tabular-nums}.grid{stroke:var(--hair);stroke-width:1}"
    ".line{fill:none;stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}"
    ".many{fill:none;stroke:var(--soft);stroke-width:1;opacity:.35}.changed{stroke:var(--soft);stroke-dasharray:3 4}"
    ".lead{fill:none;stroke:var(--soft);stroke-width:1;opacity:.6}.all{fill:none;stroke:var(--ink);stroke-width:3}"
    + "".join(
        f".s{n}{{stroke:var(--s{n})}}.m{n}{{fill:var(--s{n});stroke:var(--paper);stroke-width:1.25}}"
        for n in range(len(LIGHT))
    )
)
_SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
border-top:6px solid var(--better)}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 28px}
header{padding-top:44px}
h1{font-size:clamp(1.65rem,4.2vw,2.5rem);line-height:1.15;letter-spacing:-.018em;margin:0;font-weight:680;
overflow-wrap:anywhere;text-wrap:balance}
header p{margin:10px 0 0;color:var(--soft);overflow-wrap:anywhere}
h2{font-size:1.32rem;letter-spacing:-.01em;line-height:1.25;margin:0 0 6px;font-weight:660}
h3{font-size:1rem;margin:28px 0 8px;font-weight:640}
section{margin-top:60px}
p{margin:0 0 12px;max-width:74ch}
.soft,figcaption{color:var(--soft);font-size:.92rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:18px 28px;margin:30px 0 0;
padding:20px 0;border:solid var(--hair);border-width:1px 0}
.facts dt,.about dt{color:var(--soft);font-size:.85rem}
.facts dd{margin:2px 0 0;font-size:1.3rem;font-weight:620;line-height:1.25;font-variant-numeric:tabular-nums}
.warn{margin-top:24px;padding:12px 16px;border-left:3px solid var(--worse);background:var(--wash);max-width:none}
ol.outcomes{list-style:none;margin:10px 0 18px;padding:0;border-top:1px solid var(--hair)}
ol.outcomes>li{display:grid;grid-template-columns:minmax(0,1fr) 300px 11.5em;gap:4px 32px;align-items:center;
padding:18px 0;border-bottom:1px solid var(--hair);break-inside:avoid}
ol.outcomes>li.whole{background:var(--wash);margin:0 -16px;padding:18px 16px}
.outcomes h3{margin:0;font-size:1.06rem;overflow-wrap:anywhere;display:flex;flex-wrap:wrap;gap:2px 12px;
align-items:baseline}
.outcomes p{margin:2px 0 0;color:var(--soft);font-size:.94rem;line-height:1.45}
.verdict{font-size:.88rem;font-weight:640;white-space:nowrap;color:var(--soft)}
.verdict.better{color:var(--better)}.verdict.worse{color:var(--worse)}
.numbers{font-variant-numeric:tabular-nums;text-align:right;font-size:1.1rem;font-weight:600;white-space:nowrap}
.numbers i{font-style:normal;font-weight:400;color:var(--soft);padding:0 .2em}
.numbers small{display:block;font-size:.86rem;font-weight:400;color:var(--soft)}
.bell{display:block;width:100%;height:auto}
.bell .axis{stroke:var(--hair);stroke-width:2}.bell .way{stroke:var(--soft);stroke-width:3}
.bell .was{fill:var(--paper);stroke:var(--soft);stroke-width:2}.bell .now{fill:var(--soft)}
.bell .alone{fill:var(--ink);stroke:var(--paper);stroke-width:1.5}
.bell.better .way{stroke:var(--better)}.bell.better .now{fill:var(--better)}
.bell.worse .way{stroke:var(--worse)}.bell.worse .now{fill:var(--worse)}
.key{display:flex;flex-wrap:wrap;gap:2px 20px;color:var(--soft);font-size:.88rem;margin-top:10px}
figure{margin:26px 0 0;break-inside:avoid}
figcaption{margin:0 0 6px}figcaption b{display:block;color:var(--ink);font-size:1rem;font-weight:640}
figure svg{display:block;width:100%;height:auto}.narrow{display:none!important}
.scroll{overflow-x:auto;margin-top:12px}.scroll:focus-visible{outline:2px solid var(--better);outline-offset:3px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:15px;line-height:23px;
font-variant-numeric:tabular-nums lining-nums}
th,td{padding:8px 0 8px 24px;text-align:right;border-bottom:1px solid var(--hair);vertical-align:baseline;
white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:13.5px;line-height:19px;vertical-align:bottom;border-bottom-color:var(--soft)}
th small{display:block;font-size:13px;font-weight:400}
th:first-child,td:first-child{text-align:left;padding-left:0;background:var(--paper);position:sticky;left:0}
td.words,th.words{text-align:left;white-space:normal;min-width:15em}
tr.sum td{font-weight:640;border-bottom:0;border-top:1px solid var(--soft)}tr.best td{font-weight:640}
td .tag{font-size:.78rem;font-weight:500;color:var(--soft);margin-left:.5em}
.matrix th+th,.matrix td+td{padding-left:16px}
.scroll+p{margin-top:14px}
bdi{overflow-wrap:anywhere}td bdi,th bdi{display:inline-block;max-width:15em;overflow:hidden;text-overflow:ellipsis;
vertical-align:bottom;white-space:nowrap}
dl{margin:0}
dl.about{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:16px 32px;margin-top:16px}
.about dd{margin:1px 0 0;overflow-wrap:anywhere}
dl.kinds{display:grid;grid-template-columns:12em minmax(0,1fr);gap:12px 32px;margin-top:22px}
.kinds dt{font-weight:640}.kinds dd{margin:0;max-width:66ch;overflow-wrap:anywhere}
details{margin-top:18px}summary{cursor:pointer;font-weight:600;font-size:.95rem}
.sample{border-top:1px solid var(--hair);padding:16px 0 20px;break-inside:avoid}
.sample h3{margin:0 0 10px;font-size:.95rem;display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline}
.sample h3 span{font-weight:400;color:var(--soft);font-size:.86rem}
.sample dl{display:grid;grid-template-columns:9.5em minmax(0,1fr);gap:6px 24px}
.sample dt{color:var(--soft);font-size:.86rem;padding-top:2px}
.sample dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}.sample dd.none{color:var(--soft)}
.sample .now{font-weight:600}.nl{color:var(--soft);user-select:none;font-weight:400}
ul{margin:12px 0 0;padding-left:1.15em}ul>li{margin:6px 0;max-width:84ch;overflow-wrap:anywhere}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:72px;padding-top:18px;padding-bottom:44px;color:var(--soft);font-size:.88rem}
footer p{border-top:1px solid var(--hair);padding-top:18px;max-width:none}
@media screen and (max-width:760px){
main,header,footer{padding-left:18px;padding-right:18px}
header{padding-top:28px}section{margin-top:44px}
.facts{grid-template-columns:1fr 1fr;gap:14px 20px}.facts dd{font-size:1.12rem}
ol.outcomes>li{grid-template-columns:minmax(0,1fr);gap:10px}.numbers{text-align:left;order:1}.bell{order:2}
ol.outcomes>li.whole{margin:0 -18px;padding:16px 18px}
.wide{display:none!important}.narrow{display:block!important}
th,td{padding-left:16px}
td bdi,th bdi{max-width:8.5em}
dl.kinds,.sample dl{grid-template-columns:minmax(0,1fr);gap:2px}.kinds dd,.sample dd{margin-bottom:10px}
}
@media print{
@page{margin:16mm 14mm}
body{font-size:10pt;border-top:0}main,header,footer{max-width:none;padding:0}
ol.outcomes>li{grid-template-columns:minmax(0,1fr) 190px 10.5em;gap:4px 20px;padding:10px 0}
ol.outcomes>li.whole{margin:0;padding:10px 0}
.facts{grid-template-columns:repeat(5,auto);gap:14px}.facts dd{font-size:1.1rem}th,td{padding:5px 0 5px 14px}
section{margin-top:28pt}.scroll{overflow:visible}th:first-child,td:first-child{position:static}
h2,h3,figcaption{break-after:avoid}tr{break-inside:avoid}thead{display:table-header-group}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
SHEET = (
    f":root{{color-scheme:light dark;{variables()}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(dark=True)}}}}}{CHART}{_SHEET}"
)
