# programs.cmake: llama.cpp's own programs with our libmtmd in them, llama-server and llama-mtmd-cli. QAP_PROGRAMS=ON.
# Everything but the programs themselves is installed by llama-cpp-python already: libllama, ggml, libllama-common.
find_library(LLAMA_COMMON llama-common REQUIRED NO_DEFAULT_PATH PATHS "${LLAMA_LIB_DIR}")

file(GLOB server_sources CONFIGURE_DEPENDS "${QAP_UPSTREAM}/tools/server/*.cpp")
add_executable(llama-server ${server_sources} "${vendor_dir}/cpp-httplib/httplib.cpp")
add_executable(llama-mtmd-cli "${mtmd_dir}/mtmd-cli.cpp")

# as upstream sets them for its copy of cpp-httplib (vendor/cpp-httplib/CMakeLists.txt)
set_source_files_properties("${vendor_dir}/cpp-httplib/httplib.cpp" PROPERTIES COMPILE_DEFINITIONS
    "CPPHTTPLIB_FORM_URL_ENCODED_PAYLOAD_MAX_LENGTH=1048576;CPPHTTPLIB_LISTEN_BACKLOG=512;CPPHTTPLIB_REQUEST_URI_MAX_LENGTH=32768;CPPHTTPLIB_TCP_NODELAY=1")

if(NOT APPLE)
    # The library's file is named for llama-cpp-python (libmtmd); programs look for it by its SONAME.
    install(FILES $<TARGET_FILE:qap-mtmd> DESTINATION qap_gguf/lib RENAME libqap-mtmd.so.0)
endif()
foreach(program llama-server llama-mtmd-cli)
    target_include_directories(${program} SYSTEM PRIVATE
        native/programs "${mtmd_dir}" "${QAP_UPSTREAM}/common" "${QAP_UPSTREAM}/tools/server" "${QAP_UPSTREAM}" "${vendor_dir}")
    target_compile_definitions(${program} PRIVATE LLAMA_SHARED GGML_SHARED MTMD_VIDEO LLAMA_SUBPROCESS)
    target_compile_options(${program} PRIVATE -w)
    target_link_libraries(${program} PRIVATE qap-mtmd "${LLAMA_COMMON}" llama ggml::ggml Threads::Threads)
    set_target_properties(${program} PROPERTIES BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH "${origin}/../lib;${origin}/../../llama_cpp/lib;${origin}/../../lib")
    install(TARGETS ${program} RUNTIME DESTINATION qap_gguf/bin)
endforeach()
