# Writes OUTPUT, a C++ file that defines `NAME[]` and `NAMESize` for each FILES entry "NAME=path".
# Run as a script: cmake -DOUTPUT=... -DHEADER=... "-DFILES=kA=a.html;kB=b.css" -P EmbedText.cmake
set(text "#include \"${HEADER}\"\n\nnamespace adaattn {\n\n")
foreach(entry IN LISTS FILES)
  string(REGEX MATCH "^([^=]+)=(.*)$" matched "${entry}")
  set(name "${CMAKE_MATCH_1}")
  file(READ "${CMAKE_MATCH_2}" hex HEX)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${hex}")
  string(APPEND text "const unsigned char ${name}[] = {${bytes}0x00};\n"
                     "const std::size_t ${name}Size = sizeof(${name}) - 1;\n\n")
endforeach()
string(APPEND text "}  // namespace adaattn\n")
file(WRITE "${OUTPUT}" "${text}")
